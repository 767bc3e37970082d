"""Write a pool of visual concepts, one a line: common English words for what can be seen in a photograph.

    python text_descriptions/make_concepts.py --wordnet /usr/share/wordnet

Each category has words of our own, which are listed below, and nouns of WordNet. A noun's category is that
of the nearest listed synset above its first sense. The most common nouns are taken, up to the category's
quota; how common a noun is, is its place in 30k.txt. Of nouns with one meaning only the most common is taken.
A noun is left out where WordNet counted more uses of its other senses.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
GET = "apt-get install wordnet-base"
# No kind of these synsets is taken, nor a synset that is marked with one of these usages.
LEFT_OUT = "internal_organ.1 gland.1 reproductive_organ.1 erectile_organ.1 orifice.1 buttocks.1"
RUDE = {"slang", "obscenity", "disparagement", "ethnic_slur"}


class Category(NamedTuple):
    """Says which words a category takes."""

    quota: int  # of nouns of WordNet
    synsets: str  # noun.sense; a noun belongs to the nearest synset above it
    own: str  # our own words, which need not be in WordNet


CATEGORIES = {
    "colours": Category(
        8,
        "chromatic_color.1",
        """red, orange, yellow, green, blue, purple, pink, brown, black, white, gray, cyan, maroon, indigo,
        lavender, gold, silver, crimson, cream, tan, turquoise, violet, navy blue, sky blue, light blue,
        dark green, olive green, lime green, dark red, black and white, sepia, pastel colors, neon colors,
        multicolored, dark, bright, pale""",
    ),
    "textures, patterns and shapes": Category(
        0,
        "",
        """striped, zebra stripes, dotted, polka dots, checkered, plaid, argyle, houndstooth, herringbone,
        chevron, zigzag, paisley, floral pattern, leopard print, camouflage, tie dye, lattice, grid, mesh,
        honeycomb, hexagonal, tiled, brickwork, woven, knitted, crocheted, braided, embroidered, quilted,
        pleated, ruffled, fringed, lacy, furry, fuzzy, fluffy, hairy, woolly, feathered, scaly, spiky,
        prickly, bumpy, grooved, corrugated, wrinkled, crumpled, folded, cracked, peeling, chipped,
        scratched, torn, weathered, rusty, dusty, muddy, mossy, stained, smeared, speckled, spotted,
        marbled, veined, swirly, wavy, curly, spiral, concentric, radial, symmetrical, geometric, blurry,
        pixelated, glossy, shiny, matte, metallic, reflective, iridescent, glittering, glowing, transparent,
        translucent, frosted, foamy, bubbly, slimy, wet, smooth, rough, grainy, porous, perforated, layered,
        tangled, cobwebbed, crystalline, faceted, studded, beaded, engraved, embossed, handwritten,
        circular, square, rectangular, triangular, oval, heart shaped, star shaped, crescent, cylinder,
        cube, sphere, cone, pyramid, arch, cross, arrow, vertical lines, horizontal lines, diagonal lines,
        pointed, curved, twisted""",
    ),
    "materials": Category(
        85,
        """fabric.1 wood.1 rock.2 mineral.1 paper.1 building_material.1 fiber.1 leather.1 plastic.1 soil.2
        jewel.1 gem.2 animal_product.1 plant_product.1 metallic_element.1 alloy.1 plant_material.1
        animal_material.1""",
        """wooden, glass, stone, ceramic, porcelain, rubber, foam, wax, denim, lace, tulle, corduroy,
        burlap, plywood, hay, ice, water, oil, soil, ash, rust, smoke, dust, foil, tile, stucco, asphalt,
        cobblestone, thatch, wicker, rattan, enamel, paint, ink, glitter, slime, stained glass, stainless
        steel, corrugated iron, wrought iron, barbed wire, bubble wrap, tissue paper""",
    ),
    "parts of things": Category(
        0,
        "",
        """handle, knob, lid, button, zipper, buckle, strap, sleeve, collar, pocket, hem, cuff, hood,
        shoelace, heel, sole, hinge, latch, keyhole, door handle, doorway, window pane, windowsill, shutter,
        roof, chimney, gutter, ceiling, floor, wall, balcony, railing, column, beam, spire, turret, archway,
        wheel, tire, spoke, pedal, handlebar, steering wheel, dashboard, windshield, headlight, bumper,
        license plate, hull, mast, sail, rudder, propeller, airplane wing, cockpit, blade, barrel, trigger,
        lens, screen, keyboard, dial, switch, plug, cord, cable, antenna, socket, spout, faucet, drain,
        drawer, shelf, armrest, backrest, headboard, seat, lampshade, light bulb, clock face, book cover,
        page, picture frame, label, seam, tassel, ribbon, bow, knot, loop, hook, screw, bolt, gear, pipe,
        hose, nozzle, vent, grille, rim, edge, corner, hole, crack""",
    ),
    "parts of bodies and plants": Category(
        60,
        "external_body_part.1 body_part.1 plant_part.1 hair.1 hairdo.1 natural_covering.1",
        """face, mouth, beak, foot, eyebrow, eyelash, eyelid, lips, teeth, nostril, hair, ponytail, braid,
        beard, mustache, freckles, wrinkles, skin, tattoo, scar, fingernail, fingertip, claw, whiskers,
        feather, bird wing, fin, gill, tentacle, antler, horns, tusk, elephant trunk, mane, fur, scales,
        shell, skeleton, fang, tree trunk, treetop, branch, twig, petal, stem, thorn, bark, leaf, seed,
        pod""",
    ),
    "people": Category(
        0,
        "",
        """person, man, woman, child, boy, girl, baby, toddler, crowd, family, bride, groom, soldier, police
        officer, firefighter, nurse, surgeon, chef, farmer, fisherman, cowboy, diver, athlete, dancer,
        ballerina, musician, clown, monk, priest, king, queen, knight, pirate, astronaut, cyclist, skier,
        surfer, swimmer, audience, portrait, smile""",
    ),
    "animals": Category(
        155,
        "animal.1",
        """bear, duck, bat, bull, crow, husky, mammoth, fly, seal, sea lion, polar bear, sea turtle,
        chicken, trout, octopus, squid, eel, shrimp, coral, beaver, otter, raccoon, leopard, alligator,
        tiger, lynx, whale, hippopotamus, rhinoceros, orangutan, lemur, sloth, porcupine, hedgehog,
        armadillo, skunk, badger, weasel, hyena, stork, heron, woodpecker, toucan, magpie, quail, iguana,
        chameleon, scorpion, ladybug, centipede, slug, dachshund, dalmatian, flock of birds, school of fish,
        bird nest, spider web, beehive, egg""",
    ),
    "plants": Category(
        64,
        "plant.2 fungus.1 vegetation.1 flower.1",
        """moss, lichen, algae, seaweed, mushroom, bamboo, palm tree, pine tree, christmas tree, bonsai,
        hedge, weeds, bush, daffodil, dandelion, peony, carnation, hibiscus, hydrangea, magnolia, cherry
        blossom, water lily, flower bed, bouquet, houseplant, pine cone, acorn, driftwood, firewood, log,
        foliage""",
    ),
    "food and drink": Category(
        143,
        "food.1 food.2 beverage.1 edible_fruit.1 vegetable.1 herb.2",
        """fruit, banana, lime, cherry, plum, peach, pineapple, mango, watermelon, kiwi, pomegranate, fig,
        papaya, pumpkin, corn, carrot, potato, onion, garlic, broccoli, cucumber, pepper, lettuce, almond,
        walnut, peanut, cake, popcorn, cinnamon, noodles, icing, ice cream, hot dog, french fries, fried
        egg, birthday cake, cotton candy, red wine, coffee beans""",
    ),
    "clothing and jewellery": Category(
        52,
        "clothing.1 garment.1 footwear.1 headdress.1 jewelry.1",
        """dress, skirt, tie, belt, shoe, boot, sneaker, sandal, slipper, glove, mitten, mask, cloak, cape,
        helmet, crown, turban, armor, sunglasses, eyeglasses, goggles, watch, bracelet, pendant,
        handkerchief, bikini, wetsuit, pajamas, raincoat, veil, bow tie, t shirt, high heels, top hat, straw
        hat, baseball cap, cowboy hat, life jacket, wedding dress, lab coat, makeup, lipstick""",
    ),
    "furniture and household things": Category(
        75,
        """furniture.1 furnishing.2 container.1 bedclothes.1 kitchen_utensil.1 tableware.1 home_appliance.1
        white_goods.1 cutlery.2 cleaning_implement.1 lamp.1""",
        """table, bench, cradle, bookshelf, mirror, sink, bathtub, shower, toilet, microwave, toaster, pot,
        plate, mug, chopsticks, teapot, knife, can, bag, rug, pillow, cushion, towel, fireplace, radiator,
        chandelier, mop, brush, sponge, soap, comb, toothbrush, razor, umbrella, key, padlock, rope, thread,
        yarn, tape, wine glass, rocking chair, toilet paper, cardboard box, plastic bag, window blinds,
        trash can, vacuum cleaner, washing machine, sewing machine""",
    ),
    "vehicles": Category(
        52,
        "vehicle.1 craft.2",
        """bus, van, train, tram, motorcycle, sailboat, gondola, raft, wheelchair, wheelbarrow, stroller,
        bulldozer, excavator, forklift, crane, parachute, satellite, anchor, school bus, steam train, subway
        train, sports car, race car, police car, fire engine, fighter jet, cruise ship, container ship, hot
        air balloon, cable car, shopping cart, traffic jam""",
    ),
    "tools, machines and other things": Category(
        170,
        "device.1 instrumentality.3 weapon.1 equipment.1 machine.1 covering.2 artifact.1",
        """hammer, wrench, pliers, saw, drill, rake, needle, chain, shield, ladder, paintbrush, eraser,
        ruler, monitor, radio, microphone, headphones, loudspeaker, telescope, stethoscope, hourglass,
        sundial, calculator, flashlight, fan, pill, bandage, kite, circuit board, cash register, vending
        machine, slot machine, parking meter, gas pump, fire hydrant, traffic light, traffic cone, street
        light, power line, solar panel, wind turbine, satellite dish, water wheel, fishing net, bow and
        arrow, magnifying glass, test tube, remote control""",
    ),
    "musical instruments": Category(
        19,
        "musical_instrument.1",
        "bell, pipe organ, cymbal, bagpipes, tambourine, xylophone, piano keys, guitar strings",
    ),
    "art, signs and decoration": Category(
        42,
        "art.1 decoration.1 plaything.1 representation.2 signal.1 publication.1",
        """sign, stop sign, street sign, neon sign, text, letters, numbers, handwriting, poster, chart,
        calendar, cartoon, drawing, comic strip, oil painting, statue, bust, totem pole, pottery, origami,
        postage stamp, coin, banknote, ticket, playing cards, chess, dice, puzzle, teddy bear, balloon,
        fireworks, confetti, garland, barcode, screenshot, notebook, envelope, billboard, musical score""",
    ),
    "sports and activities": Category(
        25,
        "sport.1",
        """ball, soccer ball, tennis racket, ski, skateboard, snowboard, surfboard, barbell, scoreboard,
        dancing, ballet, concert, parade, wedding, party, picnic, camping, cooking, rodeo, bullfight, yoga,
        rock climbing, marching band""",
    ),
    "buildings and structures": Category(
        90,
        "structure.1 building.1 facility.1 depository.1 housing.1",
        """church, castle, palace, shed, pagoda, bridge, suspension bridge, tunnel, windmill, clock tower,
        water tower, igloo, treehouse, gazebo, pier, dock, obelisk, ruins, well, carousel, ferris wheel,
        roller coaster, swing, escalator, elevator, staircase, scaffolding, mailbox, log cabin, picket
        fence, stone wall, construction site, railroad track, swimming pool, power plant, oil rig""",
    ),
    "rooms and indoor places": Category(
        35,
        "room.1 area.5 enclosure.1",
        """office, library, laboratory, hallway, corridor, attic, basement, garage, gym, theater, stage,
        museum, bar, restaurant, cafeteria, supermarket, bookstore, bakery, workshop, factory, warehouse,
        stable, living room, dining room, conference room, operating room, waiting room, locker room,
        shopping mall, subway station, art gallery, wine cellar, bowling alley""",
    ),
    "outdoor places": Category(
        85,
        """geological_formation.1 body_of_water.1 land.4 tract.1 urban_area.1 way.6 workplace.1 highway.1
        forest.1 forest.2""",
        """skyline, village, intersection, crosswalk, market, field, garden, park, patio, playground,
        racetrack, runway, harbor, volcano, desert, savanna, swamp, marsh, jungle, path, junkyard, quarry,
        trench, rapids, geyser, horizon, countryside, underwater, parking lot, gas station, train station,
        bus stop, golf course, tennis court, rice paddy, corn field, bamboo forest, snowy mountain, sand
        dune, coral reef, aerial view""",
    ),
    "nature, weather and light": Category(
        26,
        "natural_object.1 atmospheric_phenomenon.1 light.1",
        """sky, blue sky, night sky, cloud, storm clouds, overcast, fog, mist, haze, raindrops, puddle,
        snow, snowflake, frost, icicle, hail, rainbow, flood, fire, flame, campfire, explosion, ember,
        spark, steam, bubbles, splash, ripples, waves, sun, sunset, sunrise, sunlight, sunbeam, twilight,
        moon, stars, galaxy, eclipse, aurora, shadow, reflection, silhouette, glare, lens flare, spotlight,
        candlelight, night, winter, autumn, summer, rock, crystal, fossil, bone""",
    ),
}

# Nouns that pass the rules and are no good here: not seen, rude, or better known as something else.
EXCLUDED = set(
    """
    aba accelerator accessory ade afghan agar airbus airline ala album alcohol alpha alum analyzer andromeda
    angelica ani anime annals anthology aperture apparatus appliance aquatic arbor architecture archive
    archives argentine armament arms arsenal artery article artifact asbestos ascent ascot asp asylum atrium
    attire authentication baba backstage balm banger bath bedrock beef ben bender benjamin bennet benny
    bestseller beta beth biennial billy binary blackjack bladder blanc bling blockbuster blower bluegrass boa
    boards body bootleg bot bracing brad bran breast breeze brent brew brig brill britt browse brunch bullpen
    burner burr buzzer cab cache calcium calculus camo canine cannabis capacitor capsule card cargo cartilage
    casing cassie casting catalog cayman cellphone chad charger chassis chilli chino chipotle chromium
    chromosome cinema cinnamon circuit circuitry cisco citation clarence cleaners clegg climber clipper
    clothing coating cobalt coca coco cole coloring colors colouring colours commodity commons commuter
    compilation compressor condom coney confectionery conglomerate connector consulate continent contraceptive
    converter cooker coping corona corrective cortex corvette cosmetic cosmos costa cosy coulter counterfeit
    coupling covering crusher cursor dahl dairy dak dale daphne das daw decoration dell derby detector detox
    device diaphragm dictionary diet digs dildo diode directory dirk ditto dobson doctorate documentary doggie
    doggy dolly dory doubles douche dredge dressing drone duct duff dun dwelling dynamo eats edible edition
    editorial electrode electron elements elves embryo emery equatorial equine equipment erica ethanol
    ethernet exit extremity facial facility facing falls fascia fax feeder female femur fetus fillet filly
    firearm fitch fixture fizz flagship flamboyant flaps flats flesh floppy fluorescence fob folder footage
    forage fore freeway freight fridge fruit fryer fuji furnishing gadget gale galley gamma gar garb gateway
    gator gazette gearbox gearing gem gemma generic gig goody graft greenwood grinder grit groin ground grub
    gulf gum gunpoint hackney halal hamstring handbook handset hanging hank hardcover hardware hash haven
    headquarters heath helm herbal hind hippocampus holder hometown hone honours hookup hopper hops horseback
    hospice housing humankind humans idol improvisation innovation input instructions instrumentation internet
    inversion ion ironing jasper journalism kali kappa kirk kit knickers knuckles kraft kris kylie lac lagging
    landing landline lap lat launcher layer leaflet ligament limb linden ling lining links lithium livery liza
    loading lobe loo lotte mac machinery mack mademoiselle magma magnesium magneto magnum mainland mako
    mandarin manila mankind mantle manual marc marcel marge marguerite marijuana marker marking marrow mart
    masterpiece maxi mayo medic mei membrane merchandise mercury merle milestone milling milo mina mine mini
    moa modeling modem molar molly mons motorbike mound mouthpiece mullet mulligan municipality muzzle napa
    nerve neutron nickelodeon nourishment nova nucleus nude nut obstruction orb ordnance oreo organ organs
    ornamental outlet output pad padding paintball palladium panty pathway paving peg pelvis pes pet phi
    photon pia piggy pike piling pinky pinnacle pinto piping placenta plating playbook plumbing poker pollard
    portal portfolio potassium potion potty premises preserves primer product projectile prop proton
    provisions publication pulp quarters queen racing radiator ration ray reactor receptor recorder recording
    rectum regulator rein relic repository reprint resistor retina rib riding ridley rings roach roadway roe
    rouge roux rowan rudd rue rung rye samba sang scenery schooner scourge scuba seasoning sectional seizing
    sensor serge setup shading sham shank shay sheath shiv shook shooter shortcut shrapnel sights sigma signal
    signaling silva simulator singles sinus site slater slit smelt smoother snapshot snowball sodium soma
    sonar soundtrack soy soybean spaceship spade spelt spirits spleen spore springer stair standby starboard
    starship starter stays steamer steamship sticker stigma stocks stole stopping storey stripe stub stuffing
    summons supper surface sustenance suture sweats swine symbolism tabloid takeaway takin tam tammy taping
    taps tarot tee telecom telecommunication telegraph telly tendon thong thrift throat throttle throughput
    thumbnail tidy till timothy tissue toby token tonic toon topping tor tore torrent transformer transit
    transponder transportation transporter trapping tripoli trolling trump truss tube tuna tung tunic turtle
    umbilical underwood universe uphill uranium vagina valve varnish vas vein veneer veronica vertebrate
    vessel vial vibes vibrator videotape vintage viola vitamin vocabulary voicemail ware warmer ways weaponry
    wearable weather website whiff whiting wildcat withers wonderland woof workings workplace works wrapper
    yam
    """.split()
)


class Synset(NamedTuple):
    """Holds what is needed of a synset of WordNet."""

    words: list
    kinds: list  # offsets of the synsets that it is a kind of
    usages: list  # offsets of the usages that it is marked with, such as slang


class WordNet(NamedTuple):
    """Holds what is needed of WordNet."""

    synsets: dict  # {offset: Synset}
    senses: dict  # {noun: offsets of its synsets, the first sense first}
    shares: dict  # {word: share of its counted uses that have its first sense as a noun}


def read_lines(path):
    """Return the lines of a WordNet file without its licence, whose lines begin with a blank."""
    with open(path, encoding="latin-1") as file:
        return [line for line in file if not line.startswith(" ")]


def read_synsets(path):
    """Return {offset: Synset}. A line has: offset, file, type, count of words, words, pointers | gloss."""
    synsets = {}
    for line in read_lines(path):
        fields = line.split("|")[0].split()
        start = 4 + 2 * int(fields[3], 16)  # a word takes two fields, and a pointer four
        pointers = list(zip(fields[start + 1 :: 4], fields[start + 2 :: 4], strict=False))
        kinds = [target for symbol, target in pointers if symbol == "@"]
        usages = [target for symbol, target in pointers if symbol == ";u"]
        synsets[fields[0]] = Synset(fields[4:start:2], kinds, usages)
    return synsets


def read_senses(path):
    """Return {noun: offsets of its synsets}. A line has: noun, type, count of synsets, ..., their offsets."""
    lines = [line.split() for line in read_lines(path)]
    return {fields[0]: fields[-int(fields[2]) :] for fields in lines}


def read_shares(path):
    """Return the shares of a WordNet. A line has: key of a sense, its number, its count of uses."""
    uses, first = Counter(), Counter()
    for line in read_lines(path):
        key, sense, count = line.split()
        word, kind = key.split("%")
        uses[word] += int(count)
        if kind.startswith("1:") and sense == "1":  # 1 is a noun
            first[word] += int(count)
    return {word: first[word] / n for word, n in uses.items() if n}


def read_wordnet(folder):
    """Return the WordNet in a folder. Exits with one line where a file of it is missing."""
    for name in ("data.noun", "index.noun", "cntlist.rev"):
        if not (folder / name).is_file():
            sys.exit(f"error: {folder / name} of WordNet is missing; get it with: {GET}")
    synsets, senses = read_synsets(folder / "data.noun"), read_senses(folder / "index.noun")
    return WordNet(synsets, senses, read_shares(folder / "cntlist.rev"))


def roots(categories, senses):
    """Return {offset: category} of the categories' synsets. Exits with one line where WordNet lacks one.

    The category of the synsets of LEFT_OUT is None.
    """
    found = {}
    for name, synsets in [(None, LEFT_OUT), *((name, c.synsets) for name, c in categories.items())]:
        for synset in synsets.split():
            noun, sense = synset.split(".")
            if len(senses.get(noun, [])) < int(sense):
                sys.exit(f"error: this WordNet has no sense {synset}; get WordNet 3.0 with: {GET}")
            found[senses[noun][int(sense) - 1]] = name
    return found


def category_of(offset, synsets, found):
    """Return the category of the nearest synset of a category at or above a synset, or None."""
    level = [offset]
    while level:
        for above in level:
            if above in found:
                return found[above]
        level = [kind for above in level for kind in synsets[above].kinds]
    return None


def common_nouns(wordnet, ranked, categories):
    """Yield (noun, offset of its first sense, its category or None), the most common noun first."""
    found = roots(categories, wordnet.senses)
    rude = {offset for offset, synset in wordnet.synsets.items() if RUDE & set(synset.words)}
    for word in ranked:
        seldom = wordnet.shares.get(word, 1) < 0.5
        if seldom or word in EXCLUDED or len(word) < 3 or word not in wordnet.senses:
            continue
        offset = wordnet.senses[word][0]
        synset = wordnet.synsets[offset]
        if word in synset.words and not rude & set(synset.usages):  # a name begins with a capital there
            yield word, offset, category_of(offset, wordnet.synsets, found)


def singular(word):
    """Return a word without the ending of a regular plural."""
    return re.sub("(?<=[^s])s$", "", re.sub("(ss|sh|ch|x)es$", r"\1", word))


def own_words(category):
    """Return our own words of a category."""
    return [" ".join(word.split()) for word in category.own.split(",") if word.strip()]


def concepts(wordnet, ranked, categories):
    """Return {category: its words}: our own, then nouns of WordNet up to the quota."""
    chosen = {name: own_words(category) for name, category in categories.items()}
    left = {name: category.quota for name, category in categories.items()}
    own = [word for words in chosen.values() for word in words]
    taken = {singular(word) for word in own}
    senses = [wordnet.senses.get(word.replace(" ", "_")) for word in own]
    meanings = {offsets[0] for offsets in senses if offsets}
    for word, meaning, name in common_nouns(wordnet, ranked, categories):
        if left.get(name) and singular(word) not in taken and meaning not in meanings:
            chosen[name].append(word)
            left[name] -= 1
            taken.add(singular(word))
            meanings.add(meaning)
    return chosen


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    help = "folder of data.noun, index.noun and cntlist.rev of WordNet 3.0"
    parser.add_argument("--wordnet", type=Path, default="/usr/share/wordnet", help=help)
    help = "common words, one a line, the most common first"
    parser.add_argument("--words", type=Path, default=HERE / "30k.txt", help=help)
    parser.add_argument("--output", type=Path, default=HERE / "concepts.txt")
    args = parser.parse_args()
    wordnet = read_wordnet(args.wordnet)
    if not args.words.is_file():
        sys.exit(f"error: {args.words} is missing; make it with: python text_descriptions/make_words.py")
    chosen = concepts(wordnet, args.words.read_text(encoding="utf-8").split(), CATEGORIES)
    for name, words in chosen.items():
        print(f"{len(words):5,} {name}, {len(own_words(CATEGORIES[name]))} of them our own")
    texts = [word for words in chosen.values() for word in words]
    args.output.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"wrote {args.output}: {len(texts):,} texts")


if __name__ == "__main__":
    main()
