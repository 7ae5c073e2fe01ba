"""Every method, in the folder of its family."""

from deltune.mechanisms import head as head
from deltune.methods.addition import adapter as adapter
from deltune.methods.addition import prefix as prefix
from deltune.methods.addition import prompt as prompt
from deltune.methods.reparameterization import lora as lora
from deltune.methods.specification import baselines as baselines
from deltune.methods.specification import bitfit as bitfit
