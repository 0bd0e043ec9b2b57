"""Pictures of views and of what a run has learnt, and the report of a run."""
