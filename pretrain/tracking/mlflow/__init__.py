"""Deliveries of runs to MLflow: their state, the client, and what each run's page shows."""
