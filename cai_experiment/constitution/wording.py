"""How a refusal and talk about a revision begin, in English. For the gate: patterns that read the start of a text.

A refusal is the speaker's ("I", "we", or nobody named) and is about helping, answering or providing: "You cannot fulfil
the order" and "I can't recommend it enough" are none. Text in quotation marks is a draft for somebody else, and no
refusal. What stands where a hedge would ("I can't give you an exact figure") goes on to help, and passes.
"""

from __future__ import annotations

import re
from functools import cache

from cai_experiment.constitution.prompts import abstains

_READ = 500  # characters of a text that are looked at
_APOSTROPHES = str.maketrans("’‘ʼ´`", "'''''")
_MARKUP = " \t\r\n*_#>-–—•"

# ---------------------------------------------------------------- refusals

_ADVERB = (  # possessive, as all that may repeat here: a text of nothing but adverbs must not take minutes
    r"(?:,? (?:(?!(?:comp|rep|supp)ly)\w+ly|also|just|even|simply|ever|still|in good (?:conscience|faith)|in any way"
    r"|at this time|under any circumstances)\b,?)*+"
)
_AM = r"(?:i am|i'm|we are|we're)"
_ASSISTANT = r"an? (?:[\w-]+ ){0,3}(?:ai|assistant|language model|model|chatbot|bot|program)\b"
_WRONG = r"(?:wrong|unethical|irresponsible|inappropriate|improper|illegal|immoral|dangerous|harmful|unsafe|impossible)"
_SORRY = rf"(?:{_AM} )?(?:(?:so|very|\w+ly) )*+(?:sorry|afraid)\b"
_SHORT = "|".join(
    (
        rf"{_SORRY}(?: to (?:say|tell you))?",
        r"(?:(?:my|our) )?(?:(?:sincere|deepest|humble) )?apologies\b",
        r"(?:i|we)(?: do| must)?(?: \w+ly)? (?:apologi[sz]e|regret(?: to (?:say|tell you|inform you))?)\b",
        rf"as {_ASSISTANT}[^.!?\n,]{{0,80}}(?=,)",
        rf"as {_ASSISTANT}",
        rf"{_AM} (?:just |only |merely )?{_ASSISTANT}",
        r"in good (?:conscience|faith)\b|to be (?:honest|clear|frank)\b|for \w+(?: and \w+)? reasons\b",
        r"(?:unfortunately|regrettably|regretfully|sadly|alas|respectfully|honestly|frankly|however|therefore|but"
        r"|so|and"
        r"|that(?= (?:i|we)\b)|well|no|nope|oh|hmm|uh|please|hi|hello|hey|dear user)\b",
    )
)
_SHORT = rf"(?>(?:{_SHORT})[\s,.;:!–—-]*)"
_LONG = (  # it says what it is sorry for, or understands, before it refuses
    rf"(?:{_SORRY}|(?:(?:my|our) )?(?:\w+ )?apologies\b|(?:i|we)(?: \w+ly)? (?:apologi[sz]e|regret|understand"
    r"|appreciate"
    rf"|reali[sz]e|recogni[sz]e|respect|hear|see|know)\b|thank(?:s| you)\b|{_AM} (?:just |only |merely )?{_ASSISTANT}"
    rf"|(?:that|this|it)(?:'s| is| would be) (?:\w+ )?{_WRONG}\b"
    rf"|my (?:purpose|goal|job|role|aim)\b|(?:i was|{_AM}) (?:programmed|designed|built|made|trained)\b"
    r"|(?:helping|assisting|providing|sharing|answering|doing|writing)\b)"
    r"[^.!?\n]{0,120}?(?:[,.;:!–—-]+ ?| (?=(?:but|that|so|and|however|as|because|i|we)\b))"
)
_NEVER = r"(?:can't|cannot|can not|won't|will not|shall not|shan't|(?:could not|couldn't) possibly)"
_CANNOT = (
    rf"(?:(?:i|we){_ADVERB} {_NEVER}(?: (?:and|or|nor) {_NEVER})?(?:{_ADVERB} be able to)?"
    rf"|(?:{_AM}{_ADVERB} )?(?:unable|unwilling|not{_ADVERB} (?:able|willing|allowed|permitted|prepared|going"
    r"|supposed"
    r"|programmed|designed|here|in a position)) to"
    r"|(?:i|we) (?:(?:do not|don't) have the (?:ability|capability|right|authority)|have no way) to"
    rf"|(?:i|we){_ADVERB} (?:refuse|decline|(?:do not|don't)(?: \w+ly)? (?:want|wish|intend)) to"
    r"|(?:i|we)(?:'d| would) (?:rather not|prefer not to))"
)
_THAT = r"(?:that|this|it|so)"
_HEDGE = (  # the rest of a sentence that says how far help goes, and not that there is none
    r"(?![^.!?\n]*\b(?:for (?:sure|certain)|certainty|enough|without (?:knowing|seeing|more|further)|unless|until|yet"
    r"|an? (?:exact|precise|firm|definite|complete|full|single|better)|the (?:exact|precise) (?:price|date|time"
    r"|figure|"
    r"number|amount)|what to (?:do|think|choose|believe)|how (?:much|happy|glad|sorry|grateful))\b)"
)
_HELPING = "|".join(
    (
        r"help(?! (?:but|it|myself|ourselves|feeling|thinking|wondering|noticing|smiling|laughing|loving"
        r"|admiring)\b)\b",
        r"(?:assist|comply|oblige|participate|take part|condone|facilitate|accommodate|honou?r)\b",
        r"fulfill? (?:that|this|it\b|(?:that|this|your|the|such|any|these|those) (?:\w+ )?(?:requests?|wish"
        r"|demands?|tasks?"
        r"|instructions?|prompt)\b)",
        r"(?:answer|respond|explain|fulfill?)(?= ?(?:[.!;\n]|$))",
        r"(?:explain|describe|suggest|outline|list|detail|say|recommend) (?:how to|ways|methods|steps)\b",
        r"be (?:a )?(?:part|party|of (?:help|assistance|service))\b",
        rf"(?:support|promote|encourage|endorse)(?: or \w+)? (?:{_THAT}|such|your|any|illegal|harmful"
        r"|violen\w+)\b(?! \w+ by)",
        r"(?:engage|provide|give|offer|share|write|create|generate|produce|discuss|draft|compose"
        rf"|supply)\b(?! to you){_HEDGE}",
        r"(?:answer|respond|reply|continue|proceed|process|complete|carry out|act on)(?: (?:to|with|on))?"
        rf" (?:{_THAT}|your|the|such|any|questions?|requests?|those|these){_HEDGE}\b",
        rf"(?:tell|show|teach|give|advise|instruct|guide) you{_HEDGE}\b",
        rf"(?:say|do|discuss|answer|recommend|reveal|disclose) {_THAT}(?= ?(?:[.,;!]|$|for you))",
        r"(?:talk|speak|comment|speculate|advise)(?: you)? (?:about|on) (?:that|this|it|such)\b",
        r"(?:reveal|disclose|advise you|recommend (?:any|ways|methods|illegal)|speculate|role-?play"
        rf"|pretend to be){_HEDGE}\b",
        rf"make (?:{_THAT}|such|jokes?|fun|up|any)\b",
    )
)
_HELPING = rf"(?:(?:endorse|support|encourage|promote|create|write|share) (?:or|and) )?(?:{_HELPING})"
_DOING = (
    r"(?:helping|assisting|providing|giving|answering|sharing|discussing|writing|doing|saying|telling|creating"
    r"|engaging"
    r"|talking|making|offering|generating|speculating|speaking|responding|taking part|going)\b"
)
_ENDS = r"(?= ?(?:[.,;:!?\n–—-]|$))"
_RULES = r"my (?:\w+ )?(?:guidelines|policy|policies|programming|principles|values|ethics|rules|instructions)\b"
_REFUSING = "|".join(
    (
        rf"{_CANNOT}{_ADVERB} {_HELPING}",
        rf"(?:i|we) {_NEVER}(?= ?(?:[.!\n]|$))",
        rf"(?:i|we) {_NEVER}{_ADVERB} be {_DOING}",
        rf"(?:can't|cannot|can not|won't){_ADVERB} (?:help|assist|comply)(?:{_ENDS}| (?:with|you)\b)",
        r"(?:(?:i|we)(?:'ll| will)?(?: must| have to| need to| am going to have to"
        rf"|'m going to have to)?{_ADVERB}"
        rf" (?:decline|refuse|say no(?: to)?)|{_AM}{_ADVERB} (?:declining|refusing))(?:{_ENDS}(?!, said)"
        rf"| (?:that|this|it|(?:that|this|your|the) (?:request|question))\b| to {_HELPING})",
        rf"{_SORRY},?(?: but)? no[.!]? ?$",
        r"(?:that|this|it)(?:'s| is) (?:\w+ )?(?:outside|beyond)(?: of)? (?:what (?:i|we) can|my (?:scope|abilities"
        r"|capabilities|guidelines))\b",
        rf"(?:{_AM}{_ADVERB} (?:not{_ADVERB} comfortable|uncomfortable)"
        rf"|(?:i|we) (?:do not|don't|wouldn't|would not){_ADVERB} feel{_ADVERB} (?:comfortable|right))"
        rf"(?:{_ENDS}| (?:with|about) (?:that|this|it|such|your|any|{_DOING})|(?: with)? {_DOING})",
        r"(?:(?:that|this|it)(?: (?:sort|kind|type) of \w+)?(?: request| question| topic)?|your (?:request|question))"
        r"(?:'s not| is not| isn't| would not be| wouldn't be)(?: \w+ly)? (?:something|anything|an? \w+"
        r"|the (?:type|kind|sort) of \w+)"
        r"(?: that| which)? (?:i|we)(?: can| could| will|'ll| am|'m|'re| are| feel| want)\b"
        r"(?! (?:know|predict|measure|see|feel|remember|check|verify|sure|certain)\b)",
        rf"(?:that|this|it)(?:'s| is) (?:something|a \w+)(?: that| which)? {_CANNOT}{_ADVERB} {_HELPING}",
        r"(?:i|we) (?:do not|don't) (?:think|believe|feel)(?: that| like)? (?:(?:i|we) (?:can|should|could"
        rf"|ought to)|{_AM}"
        rf" able to|it(?:'s| is| would be|'d be) (?:\w+ ){{1,4}}to){_ADVERB} {_HELPING}",
        r"(?:i|we) (?:do not|don't)(?: \w+ly)? (?:provide|engage in|assist|help|condone|discuss|facilitate"
        r"|offer (?:any|advice|opinions?|information|instructions|guidance))\b",
        rf"(?:i|we) (?:do not|don't) know how to (?:(?:help|assist)(?: you)?(?: with {_THAT})?|(?:do"
        rf"|answer) {_THAT}){_ENDS}",
        rf"{_AM}{_ADVERB} programmed not to\b",
        rf"there(?:'s| is) no way (?:that )?(?:i|we)(?: will|'ll| can| am going to|'m going to) {_HELPING}",
        rf"(?:it|that|this)(?:'s not| is not| isn't| would not be| wouldn't be) (?:\w+ ){{0,3}}(?:for"
        rf"|of) me to {_HELPING}",
        rf"(?:it|that|this)(?:'s| is| would be|'d be) (?:\w+ )?{_WRONG} (?:for|of) me to {_HELPING}",
        rf"(?:it|that|this)(?: would|'d) be (?:\w+ )?{_WRONG} to {_HELPING}",
        r"(?:it|that|this)(?:'s not| is not| isn't) possible for me\b",
        rf"(?:it|that|this|{_DOING}[^.!?\n,]{{0,40}}?|(?:this|that|your) request)(?: \w+ly)?"
        rf"(?:'s| is| goes| would(?: be| go)?)? ?(?:against|violates?|conflicts? with) {_RULES}",
        rf"{_RULES}(?: \w+)? (?:do not|don't|does not|doesn't|won't|prohibits?|forbids?|prevents?) ",
        r"(?:this|that|your|the) (?:request|prompt) (?:cannot|can't) be (?:fulfill?ed|completed|processed"
        r"|answered)\b",
    )
)
@cache  # compiled when first asked for: it takes longer than a script's --help should
def _refusal() -> re.Pattern[str]:
    return re.compile(rf"{_SHORT}{{0,6}}(?:{_LONG} ?{_SHORT}*+){{0,2}}(?:{_REFUSING})", re.IGNORECASE)



# ---------------------------------------------------------------- talk about a revision

_ASSENT = r"(?:(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|alright|great)\b[\s,.!:–—-]*)"
_HERE = r"(?:here(?:'s| is| are)|below is|this is|the following is)"
_ANSWER = r"(?:answer|response|reply)\b"
_TEXT = r"(?:answer|response|reply|version|text|draft|attempt|take)\b"
_REWRITTEN = r"(?:revised|rewritten|rephrased|reworded)\b"
_CHANGED = rf"(?:{_REWRITTEN}|(?:improved|updated|corrected|edited|amended|modified|new)\b)"
_BETTER = r"(?:(?:more|less) \w+|better|safer|kinder|clearer|fairer|gentler|wiser|new|different|alternative|improved)"
_EARLIER = r"(?:previous|earlier|prior|initial|original|first|last|above|former)"
_STOPS = r" ?(?:[.,;:!?\n–—*-]|$)"
_CRITIQUE = r"(?:critique|criticism|feedback|correction|comments?|revision request)"
_WHOSE = r"(?:(?:my|the|an?|final|new|(?:\w+ )?assistant's|model's) ){0,3}"
_WAS = (
    r"(?:was|were|had|did|didn't|contained|included|gave|said|suggested|(?:could|should|may|might) have|fell short"
    r"|is (?:wrong|harmful|unfair|biased))\b"
)
_META = "|".join(
    (
        rf"{_ASSENT}(?:here(?:'s| is| are)|below is|the following is)\b",
        rf"{_HERE} [^.!?\n]*?\b(?:{_REWRITTEN}|revision(?={_STOPS}| of (?:my|the|that)\b))",
        rf"{_HERE} [^.!?\n]*?\b{_CHANGED}(?: \w+)? (?:{_ANSWER}|{_TEXT}(?={_STOPS}| of (?:my|the|that) {_TEXT}))",
        rf"{_HERE} (?:an?|my|the) (?:\w+ )?{_BETTER}(?:,? (?:and )?\w+)? {_ANSWER}",
        rf"{_HERE} (?:(?:my |the |an? )?(?:second|next|new|another|other) (?:attempt|try)\b|the {_ANSWER} (?:with"
        r"|without)\b)",
        rf"{_HERE} (?:how|what) i (?:would|should|'d) (?:revise|rewrite|rephrase|have (?:said|answered))\b",
        rf"{_WHOSE}(?:{_REWRITTEN}|revision|rewrite)(?: {_TEXT})?(?: \(?\w+\)?)?[*_]* ?[])]*[*_]*(?:[:\n]|(?<=[])]))",
        rf"{_WHOSE}{_CHANGED} {_TEXT}[*_]* ?[])]*[*_]*(?:[:\n]|(?<=[])]))",
        rf"{_ANSWER} [([]?{_REWRITTEN}[])]?[*_]* ?[:\n]",
        rf"(?:the|my) {_ANSWER} (?:has been|is now|was) {_CHANGED}",
        rf"(?:in )?(?:my |the |an? |this )?{_CHANGED} {_ANSWER}(?! (?:to|from|of|by)\b)",
        r"this version (?:avoids|removes|no longer|leaves out|addresses)\b",
        rf"(?:my|the|this) (?:{_REWRITTEN} version|revision) (?:of (?:my|the|that) {_TEXT}|is (?:as follows|below)"
        r"|reads"
        r"|removes?|avoids?|addresses|keeps?|no longer|now)\b",
        rf"in (?:my|this) (?:revision|{_CHANGED} version)\b",
        rf"an? {_BETTER} {_ANSWER} (?:would|could|might|may) be\b",
        rf"an? {_BETTER} {_ANSWER}(?: is)? ?:",
        r"(?:critique|revision request|critique request)[*_]* ?:",
        r"i(?:'ve| have)(?: now| also)? (?:revised|rewritten|rephrased|reworded)\b",
        r"i(?:'ve| have)?(?: now| also)? (?:removed|taken out|changed|corrected|updated|improved|edited|adjusted"
        r"|modified"
        r"|toned down)"
        rf" (?:(?:my|the|this|that) (?:\w+ )?(?:{_TEXT}|wording|parts?\b|sentences?\b)|[^.!?\n]{{0,60}}? (?:my"
        rf"|the) {_ANSWER})",
        r"(?:(?:please )?(?:let|allow) me(?: to)?|i(?:'ll| will| can)(?: try to)?|i(?:'d"
        r"| would)(?: like to)?)(?: \w+ly)?"
        r" (?:revise|rewrite|rephrase|reword|correct|improve|amend|rectify) (?:my|the|that|this|it)\b(?! own)",
        r"(?:let|allow) me(?: to)? (?:try (?:again|that again|this again)|start over|rephrase|revise)\b",
        r"(?:based on|in light of|in response to|in view of|given|considering|following|taking into account|per"
        r"|to address"
        rf"|after (?:considering|reviewing|reading)|according to) (?:the|your|this|that) (?:\w+ )?(?:{_CRITIQUE}"
        rf"(?:,? (?:here|i|my)\b| of (?:my|the) (?:{_EARLIER} )?{_ANSWER})|critique(?:{_STOPS}| (?:above|provided"
        r"|given)))",
        r"(?:after|on|upon) (?:reflection|review|reconsideration|further thought"
        rf"|reviewing my {_EARLIER} {_ANSWER}),? (?:i|my|the)\b",
        r"as (?:you )?(?:requested|suggested|asked|instructed),? (?:here(?:'s| is| are)|i(?:'ve| have))\b",
        r"(?:i (?:\w+ly )?apologi[sz]e|(?:(?:my |our )?(?:\w+ )?apologies)|(?:(?:i'm|i am) )?(?:\w+ly |so "
        r"|very )*sorry)"
        rf"[^.!?\n]{{0,40}}?\b(?:for|about|if|that) (?:my (?:\w+ )?{_ANSWER}|(?:the|that"
        rf"|any) (?:(?:{_EARLIER} )?{_ANSWER}|confusion\b|"
        r"mistake\b|error\b|oversight\b|misunderstanding\b))",
        r"(?:i (?:now )?(?:see|understand|reali[sz]e|agree)(?: now)?(?: that)? )?(?:(?:my|the) (?:previous"
        r"|earlier|prior)"
        rf" {_ANSWER}|my (?:{_EARLIER} )?{_ANSWER} {_WAS})",
        rf"(?:rewriting|revising|rephrasing) (?:my|the) {_ANSWER}",
        rf"{_HERE} an? (?:answer|response) that (?:avoids|removes|respects|no longer|leaves out)\b",
        rf"i should have (?:been|said|given|answered)\b[^.!?\n]{{0,40}}? my {_ANSWER}",
        r"i (?:should not|shouldn't) have (?:said|suggested|given|written|recommended|told|used)\b"
        r"|i stand corrected\b",
        rf"to make (?:my|the) {_ANSWER} (?:less|more|\w+er)\b",
        rf"taking (?:the|your|this|that) {_CRITIQUE} into account",
        r"(?:as )?(?:the|your|this) (?:critique|criticism) (?:is|was|says|said|points?|pointed|notes?|noted"
        r"|rightly|found)\b",
        rf"i (?:\w+ly )?appreciate (?:the|your|this|that) {_CRITIQUE}(?:{_STOPS}| and\b)",
        r"(?:you're|you are|that's|that is)(?: \w+ly)? (?:right"
        rf"|correct)\b[^.!?\n]{{0,60}}?\bmy (?:{_EARLIER} )?{_ANSWER}",
        r"(?:you're|you are|that's|that is)(?: \w+ly)? right(?:[,.;:!–—-]+ ?(?:and )?(?:i (?:should|shouldn't"
        r"|apologi|was"
        r" wrong|made)|i'm sorry|that was|it was (?:wrong|harmful|unkind|unfair))| to (?:point|criticise|criticize"
        r"|object))",
        rf"thank(?:s| you)(?: so much| very much)? for (?:the|your|this|that|pointing) (?:\w+ )?"
        rf"(?:(?:{_CRITIQUE}|suggestions?|input|out|it out)(?={_STOPS}| on (?:my|the) (?:\w+ )?{_ANSWER}))",
        r"thank(?:s| you)(?: so much| very much)? for (?:(?:pointing|bringing) (?:that|this|it) (?:out|to)"
        r"|pointing out)\b",
    )
)
_CONCEDES = (
    r"(?:(?:(?:good|fair) point|in hindsight|looking back|on second thought|i apologi[sz]e|you make an? \w+ point"
    r"|(?:i'm |i am )?(?:so |very )?sorry|my apologies|thank you|thanks"
    r"|i see|noted"
    r"|understood|you're right|you are right|i understand)\b[\s,.;:!–—-]*)"
)

@cache
def _talk() -> re.Pattern[str]:
    return re.compile(rf"(?:{_ASSENT}|{_CONCEDES}){{0,2}}(?:{_META})", re.IGNORECASE)



def has_meta_prefix(text: str) -> bool:
    """True if `text` begins by speaking of a revision or of an earlier answer, or is a critic's abstention."""
    return bool(_talk().match(_start(text).lstrip("\"'“(["))) or abstains(text)


def is_refusal(text: str) -> bool:
    """True if `text` begins as a refusal does."""
    return bool(_refusal().match(_start(text)))


def is_bare_refusal(text: str, max_words: int) -> bool:
    """True if `text` begins as a refusal and stops there: `max_words` words or fewer."""
    return is_refusal(text) and len(text.split()) <= max_words


def _start(text: str) -> str:
    """The beginning of `text` without markup before it, with plain apostrophes and single blanks."""
    plain = text.lstrip(_MARKUP)[:_READ].translate(_APOSTROPHES)
    return re.sub(r"[^\S\n]+", " ", plain)
