"""Parts of eval_quality.py: task (questions), engine and controls (who answers), plots."""
