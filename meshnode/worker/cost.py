from dataclasses import dataclass
@dataclass
class Cost:
    flop:int=0
def cost_of(m,i): return Cost()
