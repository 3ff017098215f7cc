"""How fast a mesh comes up, takes in a newcomer and forgets the dead; what each kind of node weighs."""
