"""Writes the sample documents: six files in six formats about one small invented company, Tidewheel Cycles of Saltmere.

    python bench/samples/make_documents.py [DIRECTORY]      (default garage/assets/examples/documents)

The company, its people and its figures are made up. The documents hold about 150 facts in the forms that real papers use: tables,
key/value lines, numbered steps, glossaries, plain sentences. Needs reportlab, python-docx and python-pptx (extra `samples`). The bytes
are the same at every run: dates are fixed and archives are packed again in a fixed order.
"""

import datetime
import io
import json
import sys
import zipfile
from pathlib import Path

import docx
import pptx
from pptx.util import Inches, Pt
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.platypus import Flowable, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

WHEN = datetime.datetime(2026, 1, 5, 9, 0, 0)
Cells = list[list[str]]

# --- handbook.docx ---------------------------------------------------------------------------------------------------------------

COMPANY = [
    "Address: Quay Street 14, Saltmere",
    "Phone: 0555 0142",
    "Email: hello@tidewheel.example",
    "Founded: 2009",
    "Owner: Marta Lindqvist",
    "Motto: Ride it, fix it, pass it on",
]
TEAM = [
    ["Name", "Role", "Day off"],
    ["Marta Lindqvist", "owner", "Monday"],
    ["Joon Park", "head mechanic", "Tuesday"],
    ["Abena Osei", "rental manager", "Wednesday"],
    ["Tomas Ridley", "apprentice", "Thursday"],
    ["Ines Carvalho", "bookkeeper", "Friday"],
    ["Priya Nair", "shop assistant", "Sunday"],
]
HOURS = ["Monday: closed", "Tuesday: 8:30 to 18:00", "Thursday: 8:30 to 20:00", "Saturday: 9:00 to 16:00", "Sunday: 10:00 to 14:00"]
PLACES = [
    ["Item", "Place"],
    ["First-aid kit", "beside the coffee machine"],
    ["Fire extinguisher", "next to the back door"],
    ["Spare key", "in the blue tin"],
    ["Lost property box", "under the front counter"],
    ["Repair diary", "on the office shelf"],
    ["Fuse box", "behind the helmet rack"],
]
RULES = [
    "We are a small team, so a few plain rules keep the days calm. New staff must finish the safety course within 14 days.",
    "Tools must be back on the wall by 17:45. Till differences must be reported before closing time. "
    "Sick notes must be handed in within three days.",
    "The lunch break for full-time staff is 45 minutes. The notice period for apprentices is four weeks. "
    "The staff discount for spare parts is 25 percent. The uniform colour for mechanics is dark green.",
    "The compressor is drained every Friday. Torque wrenches are calibrated once a year. "
    "Rental brakes are checked every Monday. The workshop floor is cleaned twice a day.",
]
OPENING = [
    "Switch off the alarm with the grey card",
    "Raise the shutters on Quay Street",
    "Start the coffee machine",
    "Count the till to 150 EUR",
    "Put the rental sign outside",
]
CLOSING = ["Bring in the rental sign", "Lock the cargo bikes to the rail", "Empty the till into the night safe", "Set the alarm"]
GLOSSARY = [
    "Loaner: a bike lent free of charge during a repair",
    "Green tag: the tag on a bike that is ready to collect",
    "Red tag: the tag on a bike that must not be ridden",
    "Blue list: the list of parts to order this week",
    "Pit day: the monthly day for repairing the rental fleet",
    "Ghost bike: a repaired bike that nobody has collected for 60 days",
]

# --- workshop.pdf ----------------------------------------------------------------------------------------------------------------

SERVICES = [
    ["Service", "Price", "Duration"],
    ["Basic tune-up", "45 EUR", "1 hour"],
    ["Full service", "95 EUR", "3 hours"],
    ["Puncture repair", "14 EUR", "20 minutes"],
    ["Chain replacement", "22 EUR", "30 minutes"],
    ["Brake adjustment", "18 EUR", "25 minutes"],
    ["Wheel truing", "28 EUR", "40 minutes"],
    ["Gear cable change", "24 EUR", "35 minutes"],
    ["Battery check", "12 EUR", "15 minutes"],
    ["Child seat fitting", "16 EUR", "45 minutes"],
]
TORQUE = [
    ["Part", "Torque"],
    ["Stem bolt", "5 Nm"],
    ["Seat clamp", "6 Nm"],
    ["Crank bolt", "40 Nm"],
    ["Pedal", "35 Nm"],
    ["Brake disc screw", "4 Nm"],
    ["Wheel nut", "30 Nm"],
]
WORKSHOP_TEXT = [
    "The tyre pressure of city bikes is 4 bar. The tyre pressure of cargo bikes is 5.5 bar. "
    "The tyre pressure of mountain bikes is 2.2 bar.",
    "Chain wear is measured every 500 km. Hydraulic brakes are bled once a season. E-bike batteries are tested every six months.",
    "Degreaser is stored in the yellow cabinet. The truing stand is kept beside the long window. Old tyres are stored behind the shed.",
    "A cassette is the set of sprockets on the rear wheel. A spoke key is a small tool for tightening spokes. "
    "A master link is the chain link that opens by hand.",
]
WORKSHOP_RULES = [
    "The warranty of repairs is 12 months. The warranty of used bikes is six months. The warranty of new batteries is two years.",
    "Customers must collect repaired bikes within ten days. Quotes over 100 EUR must be confirmed by phone before work starts.",
    "The storage fee of uncollected bikes is 3 EUR per week. The diagnosis fee of electric bikes is 20 EUR.",
]

# --- prices.html -----------------------------------------------------------------------------------------------------------------

RENTAL = [
    ["Bike", "Price per day", "Deposit"],
    ["City bike", "18 EUR", "50 EUR"],
    ["Mountain bike", "29 EUR", "100 EUR"],
    ["Cargo bike", "39 EUR", "150 EUR"],
    ["Tandem", "34 EUR", "120 EUR"],
    ["Children's bike", "9 EUR", "25 EUR"],
    ["Folding bike", "21 EUR", "80 EUR"],
    ["Bike trailer", "11 EUR", "40 EUR"],
]
ARTICLES = [
    ["Article", "Price", "Colour"],
    ["Commuter helmet", "59 EUR", "black"],
    ["Children's helmet", "34 EUR", "orange"],
    ["Front light", "27 EUR", "silver"],
    ["Rear light", "15 EUR", "red"],
    ["Frame lock", "32 EUR", "dark grey"],
    ["Rain cape", "44 EUR", "yellow"],
    ["Bell", "8 EUR", "brass"],
    ["Bottle cage", "13 EUR", "white"],
]

# --- bikes.json ------------------------------------------------------------------------------------------------------------------

FLEET = [
    {"name": "Heron", "weight": "34 kg", "gears": "8", "maximum_load": "120 kg", "frame_colour": "sea blue"},
    {"name": "Plover", "weight": "15 kg", "gears": "7", "maximum_load": "105 kg", "frame_colour": "cream"},
    {"name": "Gannet", "weight": "13 kg", "gears": "12", "maximum_load": "110 kg", "frame_colour": "moss green"},
    {"name": "Puffin", "weight": "9 kg", "gears": "3", "maximum_load": "50 kg", "frame_colour": "bright red"},
    {"name": "Cormorant", "weight": "22 kg", "gears": "24", "maximum_load": "190 kg", "frame_colour": "black"},
    {"name": "Swift", "weight": "11 kg", "gears": "6", "maximum_load": "95 kg", "frame_colour": "copper"},
]

# --- onboarding.pptx -------------------------------------------------------------------------------------------------------------

SLIDES: list[tuple[str, list[str] | Cells]] = [
    ("First day", ["Start time: 8:15", "Meeting point: the bench in the yard", "Mentor: Joon Park", "Lunch: soup at the long table"]),
    ("Work contract", ["Pay day: the 28th of the month", "Overtime rate: 1.5 times the hourly wage", "Holiday: 26 days a year",
                       "Bicycle allowance: 30 EUR a month"]),
    ("Staff app", ["Name: Pedalboard", "Login: your till number", "Support contact: Ines Carvalho"]),
    ("Training courses", [
        ["Course", "Trainer", "Room"],
        ["Safety course", "Joon Park", "the yard"],
        ["Till course", "Priya Nair", "the front counter"],
        ["Rental course", "Abena Osei", "the rental desk"],
        ["First-aid course", "Marta Lindqvist", "the upstairs office"],
    ]),
    ("Codes and numbers", [
        ["Device", "Code"],
        ["Back door", "4417"],
        ["Night safe", "9062"],
        ["Office printer", "2580"],
        ["Guest network", "saltmere-guest"],
    ]),
]  # fmt: skip

# --- faq.md ----------------------------------------------------------------------------------------------------------------------

FAQ = [
    (
        "Can I bring a rental bike back on Sunday?",
        "Yes, the rental desk is open on Sunday until 14:00.",
        "Late returns go into the locked rack.",
    ),
    ("Do you repair bikes bought elsewhere?", "Yes, we repair every bike that rolls.", "Only motors of unknown make are refused."),
    ("Do I need to book a repair?", "No, but a booking saves waiting time.", "Bookings are taken by phone or at the counter."),
    ("Is there a helmet with the rental bike?", "Yes, a helmet is included in every rental.", "Ask for your size at the desk."),
    ("Can I pay by card?", "Yes, from 5 EUR upwards.", "Below that we are glad about coins."),
    ("How many bikes can a group rent?", "A group can rent up to 16 bikes.", "Please call two days ahead."),
    ("What happens if I lose the key?", "A lost key costs 12 EUR.", "We keep a second one for every lock."),
    ("May my dog ride in the cargo bike?", "Yes, if it weighs less than 30 kg.", "A blanket lies in the box."),
]
TOURS = [
    ["Tour", "Length", "Guide", "Meeting point"],
    ["Lighthouse tour", "18 km", "Abena Osei", "the ferry pier"],
    ["Orchard tour", "25 km", "Tomas Ridley", "the market cross"],
    ["Sunset tour", "9 km", "Priya Nair", "the old crane"],
]
FAQ_TAIL = [
    "The Lighthouse tour starts at 10:00. The price of the Lighthouse tour is 24 EUR. The price of the Orchard tour is 31 EUR. "
    "The price of the Sunset tour is 19 EUR.",
    "Tour places must be booked before noon on the day before. The meeting language of all tours is English.",
]


def handbook() -> bytes:
    """The staff handbook, DOCX."""
    doc = docx.Document()
    doc.core_properties.author, doc.core_properties.created, doc.core_properties.modified = "Tidewheel Cycles", WHEN, WHEN
    doc.add_heading("Staff handbook", 0)
    doc.add_paragraph("This handbook is for everyone who works with us. Keep it near the till and ask when something is unclear.")
    doc.add_heading("Tidewheel Cycles", 1)
    doc.add_paragraph("Tidewheel Cycles is a workshop, rental and shop for bicycles in Saltmere.")
    for line in COMPANY:
        doc.add_paragraph(line)
    doc.add_heading("Team", 1)
    _docx_table(doc, TEAM)
    doc.add_heading("Opening hours", 1)
    for line in HOURS:
        doc.add_paragraph(line)
    doc.add_heading("Where things are", 1)
    _docx_table(doc, PLACES)
    doc.add_heading("Working rules", 1)
    for text in RULES:
        doc.add_paragraph(text)
    for title, steps in (("Opening the shop", OPENING), ("Closing the shop", CLOSING)):
        doc.add_heading(title, 1)
        for number, step in enumerate(steps, start=1):
            doc.add_paragraph(f"{number}. {step}")
    doc.add_heading("Glossary", 1)
    for line in GLOSSARY:
        doc.add_paragraph(line)
    return _repacked(doc)


def workshop() -> bytes:
    """The workshop guide, PDF."""
    style = getSampleStyleSheet()
    story: list[Flowable] = [
        Paragraph("Workshop guide", style["Title"]),
        Paragraph("What we do, how tight, and how long it takes.", style["Normal"]),
    ]

    def part(title: str, *content: Flowable) -> None:
        story.extend([Spacer(1, 14), Paragraph(title, style["Heading1"]), *content])

    def texts(lines: list[str]) -> list[Flowable]:
        return [flowable for line in lines for flowable in (Paragraph(line, style["Normal"]), Spacer(1, 8))]

    part("Services", Paragraph("All prices include tax and small parts.", style["Normal"]), Spacer(1, 8), _pdf_table(SERVICES))
    part(
        "Torque values",
        Paragraph(
            "Use the torque wrench, never the feeling in your wrist. Grease the thread of a pedal before you turn it in.", style["Normal"]
        ),
        Spacer(1, 8),
        _pdf_table(TORQUE),
    )
    part("Good to know", *texts(WORKSHOP_TEXT))
    part("Promises to customers", *texts(WORKSHOP_RULES))
    buffer = io.BytesIO()
    SimpleDocTemplate(buffer, pagesize=A4, title="Workshop guide", author="Tidewheel Cycles", invariant=1).build(story)
    return buffer.getvalue()


def prices() -> bytes:
    """The price list, HTML."""
    parts = [("Rental", "Prices for rental bikes, helmet included.", RENTAL),
             ("Shop", "A few favourites from the shelf, from a bell to a lock.", ARTICLES)]  # fmt: skip
    body = "".join(f"<h2>{title}</h2>\n<p>{lead}</p>\n{_html_table(rows)}\n" for title, lead, rows in parts)
    page = ("<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>Price list</title></head>\n"
            f"<body>\n<h1>Price list</h1>\n{body}</body>\n</html>\n")  # fmt: skip
    return page.encode()


def bikes() -> bytes:
    """The rental fleet, JSON."""
    return (json.dumps({"fleet": FLEET}, indent=2) + "\n").encode()


def onboarding() -> bytes:
    """The slides for new colleagues, PPTX."""
    deck = pptx.Presentation()
    deck.core_properties.author, deck.core_properties.created, deck.core_properties.modified = "Tidewheel Cycles", WHEN, WHEN
    first = deck.slides.add_slide(deck.slide_layouts[0])
    first.shapes.title.text, first.placeholders[1].text = "Welcome aboard", "What new colleagues ask in their first week"
    for title, content in SLIDES:
        is_table = isinstance(content[0], list)
        slide = deck.slides.add_slide(deck.slide_layouts[5 if is_table else 1])
        slide.shapes.title.text = title
        if not is_table:
            slide.placeholders[1].text = "\n".join(str(line) for line in content)
            continue
        table = slide.shapes.add_table(
            len(content), len(content[0]), Inches(0.6), Inches(1.8), Inches(8.8), Inches(0.5 * len(content))
        ).table
        for row, cells in enumerate(content):
            for column, text in enumerate(cells):
                table.cell(row, column).text = text
                table.cell(row, column).text_frame.paragraphs[0].font.size = Pt(18)
    return _repacked(deck)


def faq() -> bytes:
    """Questions of customers, Markdown."""
    lines = ["# Questions of customers", "", "Short answers to what people ask at the counter.", ""]
    for question, answer, more in FAQ:
        lines += [f"## {question}", "", f"{answer} {more}", ""]
    lines += ["## Guided tours", "", *[f"| {' | '.join(row)} |" for row in [TOURS[0], ["---"] * len(TOURS[0]), *TOURS[1:]]], ""]
    for text in FAQ_TAIL:
        lines += [text, ""]
    return "\n".join(lines).encode()


DOCUMENTS = {
    "handbook.docx": handbook,
    "workshop.pdf": workshop,
    "prices.html": prices,
    "bikes.json": bikes,
    "onboarding.pptx": onboarding,
    "faq.md": faq,
}


def _docx_table(doc: docx.document.Document, rows: Cells) -> None:
    table = doc.add_table(rows=0, cols=len(rows[0]), style="Light Grid Accent 1")
    for row in rows:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text


def _pdf_table(rows: Cells) -> Table:
    look = TableStyle([("GRID", (0, 0), (-1, -1), 0.5, colors.grey), ("BACKGROUND", (0, 0), (-1, 0), colors.whitesmoke)])
    return Table(rows, style=look, hAlign="LEFT", colWidths=[150] * len(rows[0]))


def _html_table(rows: Cells) -> str:
    lines = ["".join(f"<{tag}>{cell}</{tag}>" for cell in row) for row, tag in zip(rows, ["th"] + ["td"] * (len(rows) - 1), strict=True)]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _repacked(document: docx.document.Document | pptx.presentation.Presentation) -> bytes:
    """The saved archive with fixed times and order of members."""
    raw, out = io.BytesIO(), io.BytesIO()
    document.save(raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in sorted(old.namelist(), key=lambda n: (n != "[Content_Types].xml", n)):
            new.writestr(zipfile.ZipInfo(name, (2026, 1, 5, 9, 0, 0)), old.read(name), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def main() -> None:
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "garage/assets/examples/documents"
    place.mkdir(parents=True, exist_ok=True)
    for name, write in DOCUMENTS.items():
        data = write()
        (place / name).write_bytes(data)
        print(f"{name:18s} {len(data):7d} bytes")


if __name__ == "__main__":
    main()
