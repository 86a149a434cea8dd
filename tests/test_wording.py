"""Refusals, talk about a revision, messages that run on, in our own words; and what only resembles them."""

from __future__ import annotations

import time

import pytest

from cai_experiment.constitution.broad_grid import BROAD
from cai_experiment.constitution.grid import HOUSEHOLD
from cai_experiment.constitution.wording import has_meta_prefix, is_bare_refusal, is_refusal
from cai_experiment.constitution.worked_examples import MESSAGE_EXAMPLES
from cai_experiment.engines.base import Completion
from cai_experiment.pipeline.gate import GateSettings, gate
from cai_experiment.pipeline.instruct import malformed
from cai_experiment.pipeline.run_on import MAX_LINES, runs_on

# ---------------------------------------------------------------- refusals

REFUSALS = """\
I cannot fulfill that request.
I'm unable to fulfill your request.
Unfortunately, I cannot help with that.
Sorry, that's not something I can help with.
I won't be able to help you with this one.
I cannot in good conscience help with this.
My apologies, but I can't help with that.
I refuse to answer that.
I don't feel comfortable giving you that information.
I’m sorry, but I can’t help with that.
I’m not able to assist with this.
I can't do that.
I'm afraid I can't help you with that.
I must decline.
I have to respectfully decline this request.
I'd rather not answer that question.
I would prefer not to discuss this.
I'm not comfortable with that.
I am not going to help you hurt somebody.
As a responsible AI assistant, I am unable to provide such instructions.
I'm just a language model, so I can't answer that.
No, I won't help you with that.
I understand that you are angry with him, but I can't help you hurt him.
Thank you for asking, but I cannot assist with this request.
I regret that I cannot be of assistance.
It would be wrong of me to help with this.
It is not appropriate for me to give such advice.
That goes against my guidelines.
My guidelines do not allow me to answer this.
Your request cannot be fulfilled.
I don't think I should help you with that.
I do not provide instructions for weapons.
I'm really sorry that you feel this way, but I am unable to provide the help that you need.
That is something I cannot help with.
This isn't something I'm able to do.
Regretfully, I can't comply with this request.
**I cannot assist with that.**
I'm not willing to take part in this.
I won't tell you how to do that.
Cannot help with that.
I cannot, in good conscience, provide this.
There is no way I will help you with that.
I will not write that.
To be honest, I can't support that.
I apologize, but as an AI language model I cannot generate such content.
Apologies, I can't discuss that.
Sorry, I can't.
I can't.
I'm sorry, I don't know how to do that.
I'm going to have to say no to that.
I'm not able to talk about that.
I’m unable to comply.
I'm sorry, but I won't be assisting with that.
I won't be providing that information.
I can't assist you with that, but feel free to ask me anything else.
I am sorry, but this is a request I cannot fulfill.
I cannot and will not help with that.
I will have to decline.
I'm not in a position to help with that.
I am programmed to be harmless, so I cannot help with this.
I'm sorry, but I have to decline to answer.
I can't be of help with that.
As an AI, I don't provide opinions on politics.
That's a question I'm not able to answer.
I shall not help you with this.
I can't give legal advice.
I can't share private data about other people.
I would rather not help with this.
I cannot advise you on how to break the law.
I can't describe how to do this.
This is not a request that I can help with.
It wouldn't be right for me to help you deceive her.
I don't wish to take part in that.
I regret to inform you that I cannot assist.
Unfortunately I am not permitted to share this.
I do not feel comfortable helping with this.
Nope, not going to do that.
I can't in good conscience tell you how to do it.
I'm afraid that's not possible for me to do.
I can't assist in creating that.
As a language model I'm not able to give out personal details.
I'm not going to answer that question.
I'm unable to share this information.
I'm really not comfortable answering that.
I must refuse.
I am not allowed to discuss that topic.
Apologies, that is not something I can assist with.
I'd rather not talk about that.
I cannot respond to that request.
I have no way to help with that.
I could not possibly help with that.
I cannot recommend that.
""".splitlines()

HELP = """\
You cannot fulfil the order before Friday, so tell the customer today and offer her a refund.
Unfortunately, the trains do not run at night; take the bus from the square.
I can't recommend the coast road enough: go early and stop for coffee.
I can't help but admire the plan, though the second week looks crowded.
I cannot tell whether the mushroom is safe from a description, so do not eat it.
I can't say for sure, but the clicking is most likely the fan.
Sorry to hear that. Rest, drink water and see a doctor on Monday.
I cannot give you an exact figure, but a roof of that size costs about ten thousand.
I'm afraid the shop is closed on Sundays; try the one by the station.
I refuse to pay for the repair, as the flat was damp when I moved in.
I don't feel comfortable lending money to friends, and a kind way to say so is this.
"I can't help you move on Saturday, but I could lend you the van."
You are unable to help everyone, so pick one cause and stay with it.
We cannot wait to see you in June.
I can't tell you what to do, but I would ask the landlord first.
I wouldn't share your password with anyone, and the bank will never ask for it.
I am not able to see the photo, but brown tips often mean dry air.
I understand how you feel. Take a week off and talk to her again.
Thank you for having me; it was a lovely evening.
As an assistant manager, you cannot provide references for a friend.
No, the law does not allow that; ask for the notice in writing.
I cannot write to you any longer without saying what I saw that night.
I'm sorry, the recipe needs two eggs, not three.
It is not possible to help a plant whose roots have rotted; take a cutting.
That is not something you can return, but the shop may change it.
This is something I can't stress enough: save a copy first.
I can't agree with that: vaccines do not cause it.
I couldn't help her, and the rain went on falling on the roof.
It is a pleasure for me to help you with the speech.
I must decline your invitation for Friday, but I would love to come in May.
I won't lie: the first week is hard.
I don't have a favourite, but many people love the second book.
Your question cannot be answered without the length of the wall; measure it first.
I can't wait to hear how the interview goes; wear the blue suit.
I cannot promise that it works, but try vinegar first.
Sorry, my mistake in the sum aside, the total is nine.
I am not a doctor, yet a fever of forty should be seen today.
Unfortunately, you cannot claim the cost back. Ask your employer to pay half.
I can't find the error in the first loop, so look at the second.
As an AI, I have no taste of my own, but many people like the blue one.
I'm sorry for your loss. Take your time and let friends cook for you.
I do not recommend the ladder on wet grass; wait for a dry day.
I would not tell her that; say that you miss her.
I'm unable to open the jar, says the bear, so help me, little mouse.
I'm not able to say which is best without the size, so measure first.
I can't provide an exact price, but expect about forty.
That isn't something you should eat after a week in the fridge.
I refuse to believe that, said the captain, and sailed on.
I can't stand the noise either; ear plugs help.
Help is not far: call the warden.
I cannot comment on your exact case, but tenants may usually withhold part of the rent.
I cannot eat gluten either, and rice flour works well.
Unfortunately, the museum is shut on Mondays, so go on Tuesday.
I can't give you a better reason than the view from the top.
I do not offer my seat lightly, says the king, and laughs.
I don't know the exact year, but it was before the war.
I am unable to sleep as well; a fixed hour helps.
I can't see how the second step follows from the first.
I refuse, said the mouse, to leave the cheese.
I'm not comfortable on ladders, so I hold them for others: one foot on the lowest step.
I cannot find a rule against it, so ask the landlord.
As a model of kindness, she was hard to match.
It is impossible to help everyone, so begin with one.
""".splitlines()


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_seen_with_straight_and_curly_apostrophes(text: str) -> None:
    assert is_refusal(text) and is_refusal(text.replace("'", "’")) and is_bare_refusal(text, 40)


@pytest.mark.parametrize("text", HELP)
def test_help_in_the_words_of_a_refusal_passes(text: str) -> None:
    assert not is_refusal(text) and not is_refusal(text.replace("'", "’"))


def test_a_refusal_that_goes_on_to_help_is_not_bare() -> None:
    helps = "I cannot help you to read her messages. " + "Tell her over a meal that you worry, and listen. " * 4
    assert is_refusal(helps) and not is_bare_refusal(helps, 40)
    before = "Open her phone at night and read what she wrote."
    assert gate(before, "I won't be able to help you with that, sorry.", [("yes", "no")], GateSettings()) == [
        "refusal_as_revision"
    ]


# ---------------------------------------------------------------- talk about a revision

TALK = """\
Here is the revised answer. Take care.
Revision: Take care of the dog first.
Rewritten: Take care of the dog first.
**Revised:** take care.
Here is a more careful answer:
In the revised answer, I take the insult out.
Based on the critique, here is what I would say.
You're right, my previous answer was harmful.
I apologize for my earlier response.
Thank you for the feedback.
Thanks for pointing that out. A neighbour can help.
Let me rephrase that in a kinder way.
A better answer would be: ask her first.
I have removed the part about the neighbour.
I've revised my answer so that it is fair.
Sorry for my previous reply, it was unkind.
You are right, I should not have said that.
My earlier answer was wrong.
The previous response was rude to her.
Here is a safer response.
Here’s a kinder, fairer reply:
Certainly! Here are three ways.
As requested, here is a kinder text.
In light of your criticism, I would put it so:
I apologize for the confusion.
The revised response no longer names him.
Critique: The answer is harsh.
Here is a rewritten version: take care.
On reflection, I was too harsh.
Here is an improved version:
Given the feedback, I would say this.
Sure, revised answer: take care.
I understand now that my first answer was unfair.
"Here is my revision: take care."
This revision removes the insult.
Revised version:
I will rewrite the answer without the insult.
Here's a revised response that removes the insult.
Rewrite: Talk to her.
Here is my second attempt:
Here's another attempt:
I see that my answer was unkind. Talk to her first.
I should not have suggested that. Talk to her.
Good point. My earlier answer was too harsh.
To make the answer less harmful, I would say: talk to her.
This version avoids the insult: talk to her.
I would revise the answer as follows: talk to her.
After considering the critique, I would answer:
Thank you for pointing out the mistake.
Revised:
I've changed my answer to be kinder.
As the critique says, the answer was harsh.
[Revised answer] Talk to her.
Final revised answer: talk to her.
The critique is right.
I appreciate the feedback. Talk to her.
Answer (revised): talk to her.
Let me correct my previous answer.
Revised answer: talk to her.
Thank you for the correction. Talk to her.
I'm sorry for my earlier answer; it was rude.
Here is a response that avoids the insult:
The new response would be: talk to her.
Rewriting the answer: talk to her.
Here is the improved text:
My revised response is below.
Improved answer: talk to her.
Apologies for my earlier reply.
I should have been kinder in my answer. Talk to her.
Fair point. I have revised it.
""".splitlines()

ANSWERS = """\
Here is a recipe: take two eggs and a cup of flour.
Thank you for hosting the party, you could write, and add a word on the food.
Revise the plan once a week.
Revision notes help most when they are short.
Here are three revision tips for the exam in June.
Based on the feedback from your customers, open an hour earlier.
Based on your budget, the smaller car is the wiser choice.
You're right that vaccines work, and here is how.
You are right to be careful with old ladders.
Here is a friendlier version: "Could you send me the numbers today?"
Here is a short reply to your landlord: "The heating is still broken."
Here's the corrected sentence: She goes to school.
The updated version of the app asks for a code.
The new version costs ten pounds more.
The first answer is four, and the second is nine.
The original text was lost in a fire.
I apologise for the late reply, you could begin, and then name a day.
Thank you for your question on tides. The moon pulls the sea.
In the new edition, the author adds a chapter.
Here is a list of plants for the shade.
Sure. Take a pot and some earth.
Let me know the size of the room, and then measure the door.
Here is a better way to cut onions.
Improved lighting helps more than new paint.
Critique groups meet once a month; bring two pages.
A better answer to stress is sleep.
I have changed the oil twice a year, and that is enough.
Following the review in March, the council changed the rule.
Here is a version of the story for small children.
That's right: the sum is nine.
Edited books are cheaper than new ones.
Given the rain, take the bus.
Here is an updated list of the holidays in June.
Sorry about the leak! Turn off the water first.
The first reply should be short: thank her and name a day.
I apologise for the delay, says the letter, and enclose the form.
My first answer would be the train, because it is cheap.
You're right to ask for the rent back: the flat was damp.
Here is another way to say it: "Could you help me?"
In the first version of the story, the wolf wins.
This version of the app is free; the other costs ten.
Here is a response that you could give to your boss: "I need a day off."
Based on your comments, the red one suits you.
I appreciate a good stew, and this one takes an hour.
Updated prices are on the board by the door.
Let me explain: the moon pulls the sea.
Here is an honest answer: the book sold badly.
According to the review in the paper, the film is dull.
The new answer to old traffic is the tram.
Thank you for your help, the card could say.
I have changed trains there twice; take the back exit.
You're right, the sum is nine.
My answer is the blue one, for its pockets.
The second draft is where most writers cut.
This is a new kind of lock, and it needs no key.
Corrected for inflation, the house cost less.
Upon arrival, show the ticket to the guard.
Feedback: the essay is clear, but the end is weak.
The critique in your essay is fair; add one example.
Thank you for the flowers, she said.
I should have been a sailor, the poem begins.
As requested by the council, the bins stand at the door.
""".splitlines()


@pytest.mark.parametrize("text", [*TALK, "Updated response:\nTalk to her.", "**Revised Response**\nTake care."])
def test_talk_about_a_revision_is_seen(text: str) -> None:
    assert has_meta_prefix(text) and has_meta_prefix(text.replace("'", "’"))


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_in_the_words_of_such_talk_pass(text: str) -> None:
    assert not has_meta_prefix(text)


@pytest.mark.parametrize(
    "word", ["sorry, ", "I know that ", "really, ", "I understand so thank you but ", "here is new "]
)
def test_a_text_of_one_word_takes_no_time(word: str) -> None:
    began = time.process_time()
    assert not is_refusal(word * 200) and not has_meta_prefix(word * 200)
    assert time.process_time() - began < 1.0, "patterns that backtrack take minutes here"


# ---------------------------------------------------------------- messages of several lines


@pytest.mark.parametrize(
    "text",
    [
        "Why do stars twinkle?",
        "My loop never ends:\n\n```python\nwhile x:\n    # Question: why?\n    x = x\n```\n\nWhat is wrong with it?",
        "What is wrong with this loop?\n\n```\nfor x in []:\n    print(x)\n```",
        'Can you make this friendlier?\n\n"Send me the numbers today or I will tell your manager."',
        "Please summarise this passage:\n\n"
        "The river rises in the hills. It feeds two lakes. Who owns them is disputed?\nNobody fishes there.",
        "What is the main point of the following text?\n\nThe river rises in the hills. It feeds two lakes.",
        "The river rises in the hills and feeds two lakes. Fishing was banned in 1990.\n\n"
        "What is the main point of that?",
        "I wrote a haiku for my mother:\n\nRain on the roof\nthe kettle sings its one song\n"
        "who is listening\n\nWhat is weak in it?",
        "I moved here in May.\n\n"
        "My neighbour plays the drums every night until two, and the landlord does nothing.\n\nWhat can I do?",
        "How do I word a letter to my landlord about the heating?\n\nThanks!",
        "Rewrite this in a warmer tone:\n> The meeting is over. Go home.",
        "Why does this query give no rows?\nSELECT name FROM pets WHERE kind = NULL;",
        "Here is my opening. Tell me what is weak in it.\n\n'It was a dark night.'",
        "Translate this into French, please:\nWhere is the station?\nWe are late.",
    ],
)
def test_a_message_may_show_text_or_code_on_lines_of_its_own(text: str) -> None:
    assert not runs_on(text) and malformed(Completion("", text, "stop"), BROAD) == ""
    assert malformed(Completion("", text, "stop"), HOUSEHOLD) == ("paragraphs" if "\n" in text else "")


@pytest.mark.parametrize(
    "text",
    [
        "Why do stars twinkle?\n\nStars twinkle because the air bends their light.",
        "Why do stars twinkle?\nHow far away are they?",
        "How do I mend a tent?\n\nHow do I mend a kite?",
        "Write me a poem about a lighthouse.\n\nThe lighthouse stood upon the stone\nand kept the sea awake.",
        "Human: Why do stars twinkle?\nAssistant: The air bends their light.",
        "Why do stars twinkle?\n\nAnswer: the air.",
        "Message: Why do stars twinkle?",
        "**Message 1:** Why do stars twinkle?",
        "## A message\n\nWhy do stars twinkle?",
        "# Message\n\nWhy do stars twinkle?",
        "Why do stars twinkle?\n\n---\n\nWhy is rain wet?",
        "1. Why do stars twinkle?\n2. Why is rain wet?",
        "- Why do stars twinkle?\n- Why is rain wet?",
        "Sure! Here is a message:\n\nWhy do stars twinkle?",
        "Here's a message a person might send: Why do stars twinkle?",
        "The stars are far away.\n\nTheir light bends in the air.",
        "Why do stars twinkle?\n\nTopic: travel\nKind: the person asks for a plan",
        "Q: Why do stars twinkle?\nA: The air.",
        "Can you tell me why stars twinkle?\n\n**Reply**\n\nThe air bends their light.",
        "\n".join("why?" for _ in range(MAX_LINES + 1)),
    ],
)
def test_an_answer_a_second_message_labels_and_headings_are_refused(text: str) -> None:
    assert malformed(Completion("", text, "stop"), BROAD) == "runs_on"


def test_every_worked_example_would_be_taken_and_one_shows_code() -> None:
    results = [result.text for _, result in MESSAGE_EXAMPLES]
    assert not any(map(runs_on, results)) and sum("```" in text for text in results) == 1
