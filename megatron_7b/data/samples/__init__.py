"""What a run reads from corpora: order, blends, samples of each kind, batches."""
