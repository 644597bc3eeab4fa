"""Processes, devices, random numbers by address, signals and profiling, free of anything of this project."""
