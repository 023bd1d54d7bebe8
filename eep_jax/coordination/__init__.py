"""How ranks and supervisor agree on a change: two pure state machines and what they say."""
