"""How it is learned: settings and recipes, the plan of a run, the trainer, its checkpoints and its guard."""
