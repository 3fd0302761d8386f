"""What every command shares: options, the folder of a run, and how a command ends."""
