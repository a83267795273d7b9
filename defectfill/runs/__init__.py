"""What a run needs around the method: flags, plan, files, checkpoints, manifest, report, record, the Hub."""
