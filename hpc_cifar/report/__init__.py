"""What a run or a campaign was worth: one page, text, or a W&B report."""
