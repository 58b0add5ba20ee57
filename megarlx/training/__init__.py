"""The step that trains: stages, their objectives' updates, how these are combined and saved."""
