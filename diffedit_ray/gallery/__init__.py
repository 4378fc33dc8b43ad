"""Pictures for people: before, mask, after."""
