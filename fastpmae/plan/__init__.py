"""`fastpmae-plan`: what a run will take, counted before a GPU is paid for."""
