"""A reproducible companion to 'SAEs as Stethoscopes, Not Scalpels' (arXiv 2605.28649).

Six steps, one module and one notebook each: `task_vectors`, `sae_features`, `subspace_projection`, `layer_selection`,
`minerva_math`, `significance`. `study.Study` wires them to a profile and keeps what they make.
"""
