"""How good are the edits: metrics against known truth."""
