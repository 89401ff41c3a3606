"""The public operations, one file each: check the arguments, choose an implementation, run it."""
