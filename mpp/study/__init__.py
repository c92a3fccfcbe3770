"""What pretraining is worth, measured: several pretrainings, fine-tuning beside scratch, frozen features, tables."""
