"""What the command line does, a file a command. Standard library only until a command runs."""
