"""The rivals of BTX, and its other forms: the paper's random routers, and branches that train only feed-forwards."""

forms = True
upcycle_flags = "--learning_rate=3e-4"  # dense training's and the branches'
