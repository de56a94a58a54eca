"""One thin module per command of `megatron-7b`; `main` finds the command and prints what a user can mend."""
