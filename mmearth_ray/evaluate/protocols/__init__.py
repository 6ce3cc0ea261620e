"""How an encoder is scored: protocols on frozen features and by fine-tuning, metrics, intervals, splits."""
