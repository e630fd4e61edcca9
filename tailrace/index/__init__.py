"""The prefix index: which worker holds which block. Entries are hints; a miss at the owner is normal."""
