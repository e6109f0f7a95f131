"""Our recipe, as config/lesson has it: branches train their feed-forwards alone, routers start from contrasts."""

method = "btx"
