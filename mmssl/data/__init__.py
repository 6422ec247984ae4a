"""Files: what a path holds, how one file is read safely, and the ledger of those that could not be."""
