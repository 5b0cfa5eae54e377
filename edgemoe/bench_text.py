# SPDX-License-Identifier: MIT
"""The text that `edgemoe bench` reads: plain English prose of many subjects, so that experts are chosen as in use.

Random tokens would route otherwise (docs/experiments.md). Written for this purpose.
"""

TEXT = """\
A refrigerator does not make cold; it carries heat away. Inside its walls a fluid evaporates at a low pressure and
takes up heat from the food, and a small compressor then squeezes the vapour until it is hotter than the kitchen, so
that a coil at the back can give the heat to the room. When the door is left open the machine runs without pause, and
because the motor itself turns electricity into heat, the kitchen as a whole grows warmer, not cooler. A thermostat
that clicks every few minutes is a sign of health; one that never clicks has either a leaking seal or a child with an
experiment.

In the spring of that year the harbour froze for the last time. Fishermen who had walked out to their nets in February
sold the sledges in April, and by summer the boys had forgotten which of the islands could be reached on foot. My
grandmother kept a diary in which the weather takes more room than the war: wind from the north-west, three degrees of
frost, two ships waiting beyond the bar. "Nothing happened today," she wrote on the day the mill burned down, "except
that the sky was red until midnight, and nobody slept."

To sort a list, a program may split it in two, sort each half in the same way, and merge the halves by always taking
the smaller of the two front elements. The work doubles with each level while the pieces halve, so a list of n
elements needs about n times the logarithm of n comparisons. The method is stable, which means that equal elements
keep their order, and it reads memory from one end to the other, which is what disks and caches like best. Its price
is a second list of the same length. Where memory is scarce, one may sort in place with a heap instead, and accept
that equal elements change places.

The committee met on Tuesday, 14 March, at half past nine. Present were the treasurer, the secretary and seven
members; two had sent apologies. The accounts for the past year showed an income of 41,250 and expenses of 38,900, of
which the new roof was by far the largest item. A motion to lower the fee was put to the vote and lost by five to
four. The secretary was asked to find out whether the hall could be let on Sundays, and what the neighbours would say
about it.

Bread needs four things and patience. Mix five hundred grams of flour with three hundred and fifty of water, and let
the dough rest for half an hour before the salt goes in; the flour drinks during that time, and kneading becomes
short. Add ten grams of salt and a little yeast, fold the dough every thirty minutes for three hours, and put it into
a cold place overnight. In the morning heat the oven as far as it will go, with an iron pot inside. A loaf is done
when its bottom sounds hollow. Those who cut it while it is hot will have gum instead of crumb, and they will have
been warned.

Light takes eight minutes and twenty seconds from the sun to us, but the energy it carries was set free much earlier:
in the core of the star a photon is scattered so often that its descendants need tens of thousands of years to reach
the surface. What we see as a calm yellow disc is therefore old news, well mixed. Neutrinos bring fresher reports.
They cross the whole of the star in two seconds, and the few that stop in our detectors tell what the core is doing
now.

"You cannot be serious," said Anna, and put the letter down. "He wants to sell the boat to a man who has never been at
sea." "He has been to sea once," her brother answered, "as a passenger, and was sick." They both looked out of the
window, where the boat lay on its side in the mud, patient as a cow. It had carried three generations and a piano.
"Then we shall have to teach him," said Anna at last. "Swimming first."

A contract is concluded when an offer is accepted without changes. An answer that adds conditions is not an acceptance
but a new offer, and the first party is free to leave it unanswered. Silence counts as consent only where the parties
have agreed on that before, or where it is the custom between merchants of the same trade. Whoever relies on a promise
that was made by telephone should write down the hour, the name and the words, because memory is a poor witness and
gets poorer when money is involved.

Migrating birds use more than one compass. By day they read the sun and correct for the hour; at night they know the
point around which the stars turn; and under clouds they still find the direction in which the lines of the magnetic
field dip into the ground. Young cuckoos, raised by foster parents that never leave the valley, fly alone to a forest
in Africa that no one has shown them. How a map can be inherited is not known. That it can be is beyond doubt, because
every August they leave, and every April some of them are back.
"""
