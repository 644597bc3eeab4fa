"""Options and the start of a script: alone in reading the command line."""
