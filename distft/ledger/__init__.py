"""What a run's own files prove of it: which rows it used, what each of them cost, where its time went."""
