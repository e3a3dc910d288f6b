"""What measures this machine for the package: its timing, and the commands that write its data."""
