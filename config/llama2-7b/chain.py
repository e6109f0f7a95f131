"""No rivals of BTX: each would cost as much again. The paper's BTX took 926 GPU-days, its upcycling 1,007."""

rivals = False
