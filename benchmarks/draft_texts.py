# SPDX-License-Identifier: MIT
"""What `benchmarks.drafts` lets a model write: prompts whose answers repeat them, and prompts whose answers do not."""

from __future__ import annotations

import dataclasses

REPEATING, NEW = "repeating", "new"


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt; `kind`: whether what follows repeats it, for a model that can tell."""

    kind: str
    prompt: str


_PASSAGE = """\
The lighthouse of Varn stands on a rock that the charts of the last century do not show. Its keeper, a retired \
mathematics teacher named Oda Lindqvist, wrote down the weather every three hours for thirty-one years. When the lamp \
was replaced by a machine in 1974, the harbour office asked for her notebooks, and found in them not only wind and \
pressure but the names of ninety-two ships, the colours of their funnels, and a short remark about each captain who \
had waved. Nobody has found a mistake in them. Two historians from Bergen used the notebooks to date a storm that had \
been argued about for decades, and a third one counted the birds.
"""

_CODE = '''\
class Thermostat:
    """Keeps a room between two temperatures."""

    def __init__(self, lowest_celsius, highest_celsius, heater, fan):
        self.lowest_celsius = lowest_celsius
        self.highest_celsius = highest_celsius
        self.heater = heater
        self.fan = fan
        self.history = []

    def update(self, temperature_celsius, seconds):
        self.history.append((seconds, temperature_celsius))
        if temperature_celsius < self.lowest_celsius:
            self.heater.switch_on()
            self.fan.switch_off()
        elif temperature_celsius > self.highest_celsius:
            self.heater.switch_off()
            self.fan.switch_on()
        else:
            self.heater.switch_off()
            self.fan.switch_off()

    def average_celsius(self, since_seconds):
        recent = [t for s, t in self.history if s >= since_seconds]
        return sum(recent) / len(recent) if recent else None
'''

_LIST = """\
- Maria Oliveira, Lisbon, sells ceramic tiles, joined in March 2011
- Tomasz Nowak, Gdansk, repairs sailing boats, joined in June 2013
- Aylin Demir, Izmir, grows figs and olives, joined in May 2014
- Henrik Solberg, Tromso, guides winter tours, joined in January 2016
- Chiara Ricci, Bologna, binds old books, joined in October 2017
- Noor Haddad, Amman, designs water pumps, joined in April 2019
- Kwame Mensah, Accra, teaches carpentry, joined in August 2020
"""

# William Blake, "The Tyger" (1794)
_POEM = """\
Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?

In what distant deeps or skies
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?

And what shoulder, and what art,
Could twist the sinews of thy heart?
And when thy heart began to beat,
What dread hand? and what dread feet?
"""

_SENSORS = """\
[sensor.cellar]
address = "10.0.4.17"
unit = "celsius"
interval_seconds = 300
alarm_above = 18.5
owner = "Marit Bakken"

[sensor.greenhouse]
address = "10.0.4.23"
unit = "celsius"
interval_seconds = 60
alarm_above = 31.0
owner = "Dawit Tesfaye"
"""


def _chat(request: str) -> str:
    return f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"


TEXTS = {
    "passage": Text(REPEATING, f"{_PASSAGE}\nThe same text once more, word for word:\n\nThe lighthouse of Varn stands"),
    "code": Text(
        REPEATING,
        f"# thermostat.py\n{_CODE}\n\n# radiator.py: the same class, called Radiator\n"
        + "\n".join(_CODE.replace("Thermostat", "Radiator").splitlines()[:4]),
    ),
    "list": Text(
        REPEATING,
        f"Members:\n{_LIST}\nThe same members, numbered:\n"
        "1. Maria Oliveira, Lisbon, sells ceramic tiles, joined in March 2011\n2. Tomasz",
    ),
    "poem": Text(
        REPEATING,
        f"The Tyger, by William Blake:\n\n{_POEM}\nThe Tyger, by William Blake, once more:\n\nTyger Tyger, burning",
    ),
    "sensors": Text(
        REPEATING,
        f'# north.toml\n{_SENSORS}\n# south.toml: the same sensors at 10.0.5\n[sensor.cellar]\naddress = "10.0.5.17"\n',
    ),
    "story": Text(NEW, _chat("Write a long story about a girl who finds a map in the attic of her grandmother.")),
    "letter": Text(NEW, _chat("Write a letter to a friend about your first week in a new city.")),
    "island": Text(NEW, _chat("Explain how a letter travels from a small island to a big city.")),
    "market": Text(NEW, _chat("Describe a market in the morning.")),
}
