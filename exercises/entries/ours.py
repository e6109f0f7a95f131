"""Our recipe, from config/lesson: branches train only their feed-forwards, routers start from contrasts."""

method = "btx"
