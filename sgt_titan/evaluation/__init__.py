"""What an export costs and hides, measured from the client's side. Never imports torchtitan."""
