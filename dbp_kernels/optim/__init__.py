"""The optimiser form: decorrelation learnt beside any torch optimiser, on an unmodified model."""
