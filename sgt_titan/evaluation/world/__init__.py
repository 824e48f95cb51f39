"""What an evaluation measures on: rows, the ways to hide them, and what an attacker is granted."""
