"""An occupant of a room who uses slixmpp, and stays: he asks the room whether he is still in, as XEP-0410 says.

    occupant.py JID PASSWORD ROOM NICK SECONDS_BETWEEN_PINGS

It does what its standard input says, a line each (`say WORDS`, `roster`), and tells what happens on its standard output, a JSON object each.
If he finds that he is out he enters again, which is told as well.
"""

import asyncio
import json
import sys

import slixmpp
from slixmpp.exceptions import IqError, IqTimeout

# XEP-0410 §3.3: the client of the occupant does not do pings, but he is there; and all that may be the network's fault.
INSIDE = {"service-unavailable", "feature-not-implemented", "item-not-found"}
UNDECIDED = {"remote-server-not-found", "remote-server-timeout"}

PING_PATIENCE_SECONDS = 120


def tell(**what):
    print(json.dumps(what), flush=True)


class Occupant(slixmpp.ClientXMPP):
    def __init__(self, jid, password, room, nick, interval):
        super().__init__(jid, password)
        self.room, self.nick, self.interval = room, nick, interval
        for plugin in ("xep_0030", "xep_0045", "xep_0199"):
            self.register_plugin(plugin)
        # The server is on this machine.
        self["feature_mechanisms"].unencrypted_plain = True
        self["feature_mechanisms"].unencrypted_scram = True
        self.add_event_handler("session_start", self.begin)
        self.add_event_handler("disconnected", lambda _: tell(disconnected=True))
        self.add_event_handler("groupchat_message", self.hear)
        self.add_event_handler("message_error", lambda message: tell(error=message["error"]["condition"]))
        self.add_event_handler("groupchat_message_error", lambda message: tell(error=message["error"]["condition"]))
        self.add_event_handler(f"muc::{room}::presence", self.see)

    async def begin(self, _):
        self.send_presence()
        self.enter()
        asyncio.ensure_future(self.obey())
        asyncio.ensure_future(self.ask_again_and_again())

    def enter(self):
        self["xep_0045"].join_muc(self.room, self.nick, maxhistory="0")

    def hear(self, message):
        if message["body"]:
            tell(heard=message["body"], nick=message["mucnick"])

    def see(self, presence):
        codes = {status.get("code") for status in presence.xml.iter("{http://jabber.org/protocol/muc#user}status")}
        if presence["from"].resource == self.nick and presence["type"] in ("unavailable", "available", "error"):
            tell(self=presence["type"], codes=sorted(codes))

    async def ask_again_and_again(self):
        while True:
            await asyncio.sleep(self.interval)
            verdict = await self.ask()
            tell(ping=verdict)
            if verdict == "out":
                tell(rejoin=True)
                self.enter()

    async def ask(self):
        try:
            await self["xep_0199"].send_ping(
                slixmpp.JID(f"{self.room}/{self.nick}"), timeout=PING_PATIENCE_SECONDS
            )
            return "inside"
        except IqTimeout:
            return "undecided"
        except IqError as error:
            condition = error.condition
            if condition in INSIDE:
                return "inside"
            return "undecided" if condition in UNDECIDED else "out"

    async def obey(self):
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        while line := (await lines.readline()).decode().rstrip("\n"):
            order, _, rest = line.partition(" ")
            if order == "say":
                self.send_message(mto=self.room, mbody=rest, mtype="groupchat")
            elif order == "roster":
                tell(roster=sorted(self["xep_0045"].get_roster(self.room)))


def main():
    jid, password, room, nick, interval = sys.argv[1:]
    occupant = Occupant(jid, password, room, nick, float(interval))
    occupant.connect(("127.0.0.1", 5222), disable_starttls=True)
    occupant.process()


main()
