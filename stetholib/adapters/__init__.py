"""Other people's machines, each behind one door: the Trainer and peft, SAELens, lm-evaluation-harness."""
