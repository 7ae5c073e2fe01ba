"""Every method, in the folder of its family."""

from deltune.families.addition import adapter as adapter
from deltune.families.addition import prefix as prefix
from deltune.families.addition import prompt as prompt
from deltune.families.reparameterization import lora as lora
from deltune.families.specification import baselines as baselines
from deltune.families.specification import bitfit as bitfit
from deltune.mechanisms import head as head
