"""Runs that were made elsewhere, as `records.Run`: what is missing there is marked, never guessed."""
