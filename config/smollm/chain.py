"""The rivals of BTX, and its other forms: the paper's random routers, and branches that train feed-forwards alone."""

forms = True
upcycle_flags = "--learning_rate=3e-4"  # dense training's and the branches'
