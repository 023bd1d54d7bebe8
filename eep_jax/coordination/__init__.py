"""Two-phase change of members and placement: pure state machines of supervisor and rank."""
