"""What this host can do, and which mechanism enforces which policy field here."""
