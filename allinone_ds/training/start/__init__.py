"""What is checked before a run trains: by `allinone-ds check`, and by the trainer when it is created."""
