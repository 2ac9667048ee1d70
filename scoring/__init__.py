"""Fine-tuning and scoring on GLUE-style tasks."""
