"""The words of the recall tasks, in English and Chinese.

The English prompts, except `kv`, are RULER's (arXiv 2404.06654).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    """The texts from which the documents in one language are made.

    Attributes:
        space: the text between sentences, and before an answer.
        letters: the letters of keys and of names of variables.
        key_length, variable_length: the number of letters in a key, and in the name of a variable.
        adjectives, nouns: a needle's key is an adjective and a noun.
        filler: sentences with places for two nouns.
        noise: RULER's filler for variable tracking.
        joined: the text between the keys in a list, and the text before the last key.
        needle: the sentence to find.
        chain: the first assignment, and a later one.
        kv, one_needle, needles, variables: for each kind of task, the instruction and the beginning of the answer.
    """

    space: str
    letters: str
    key_length: int
    variable_length: int
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    filler: tuple[str, ...]
    noise: str
    joined: tuple[str, str]
    kv: tuple[str, str]
    needle: str
    one_needle: tuple[str, str]
    needles: tuple[str, str]
    chain: tuple[str, str]
    variables: tuple[str, str]


# fmt: off
ENGLISH = Texts(
    space=" ",
    letters="abcdefghijklmnopqrstuvwxyz",
    key_length=5,
    variable_length=5,
    adjectives=(
        "ancient", "bitter", "brave", "bright", "calm", "clever", "cold", "curious", "distant", "dusty", "eager",
        "early", "empty", "faint", "fierce", "foggy", "fragile", "gentle", "golden", "happy", "heavy", "hidden",
        "hollow", "humble", "icy", "jolly", "late", "lively", "lonely", "loud", "mellow", "modest", "narrow", "noisy",
        "odd", "pale", "patient", "proud", "quick", "quiet", "rapid", "rough", "rusty", "salty", "sharp", "shy",
        "silent", "silver", "sleepy", "slow", "small", "smooth", "solid", "steep", "stormy", "sunny", "tidy", "tiny",
        "vast", "vivid", "warm", "wild", "windy", "wise",
    ),
    nouns=(
        "anchor", "apple", "basket", "beach", "bell", "boat", "bottle", "bridge", "button", "candle", "canyon",
        "castle", "cellar", "clock", "cloud", "coast", "compass", "corner", "desert", "door", "drum", "engine",
        "fence", "field", "forest", "fountain", "garden", "gate", "glove", "harbor", "hill", "island", "kettle",
        "ladder", "lake", "lantern", "letter", "market", "meadow", "mirror", "mountain", "needle", "orchard",
        "paddle", "path", "pebble", "piano", "pillow", "pond", "river", "road", "roof", "sail", "shadow", "shelf",
        "spoon", "station", "stone", "street", "table", "tower", "train", "valley", "window",
    ),
    filler=(
        "People often walk from the {0} to the {1} before it gets dark.",
        "Nobody remembers who built the {0} next to the {1}.",
        "In the morning the {0} is wet, and the {1} is still cold.",
        "A painter once drew the {0}, but she left out the {1}.",
        "The road behind the {0} is longer than the one behind the {1}.",
        "Children like to hide between the {0} and the {1}.",
        "After the storm, the {0} had to be repaired, and so had the {1}.",
        "Most visitors come for the {0} and stay for the {1}.",
    ),
    noise="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    joined=(", ", ", and "),
    kv=(
        "Memorize the values in the following dictionary. I will ask you for one of them afterwards.\n"
        "{context}\nWhat is the value of the key \"{query}\"?",
        "The value of the key \"{query}\" is",
    ),
    needle="One of the special magic numbers for {key} is: {value}.",
    one_needle=(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided "
        "text?",
        "The special magic number for {query} mentioned in the provided text is",
    ),
    needles=(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in "
        "the provided text?",
        "The special magic numbers for {query} mentioned in the provided text are",
    ),
    chain=("VAR {0} = {1}", "VAR {0} = VAR {1}"),
    variables=(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined "
        "the value {query}, they are:",  # the spelling error is RULER's
    ),
)

CHINESE = Texts(
    space="",
    letters=(
        "安白北冰波才草长晨川春达丹德东冬方飞风丰刚高光广国海寒好和河红洪华怀辉江金锦京静开康可兰乐磊立林灵龙路明"
        "木南宁平青清晴秋泉仁荣山诗石水松天田文武西夏香小晓心新星雪阳雨元月云泽志中竹子"
    ),
    key_length=3,
    variable_length=3,
    adjectives=(
        "安静", "宝贵", "饱满", "笨重", "灿烂", "苍老", "沉默", "迟到", "聪明", "脆弱", "单纯", "淡淡", "低调", "遥远",
        "丰富", "干净", "高大", "孤单", "古老", "光滑", "害羞", "寒冷", "豪华", "红色", "欢快", "活泼", "机灵", "骄傲",
        "金色", "精致", "空旷", "快乐", "蓝色", "老旧", "冷清", "明亮", "模糊", "耐心", "暖和", "平静", "朴素", "奇怪",
        "谦虚", "轻巧", "清澈", "热闹", "柔软", "善良", "神秘", "温柔", "细小", "新鲜", "雪白", "炎热", "勇敢", "整齐",
    ),
    nouns=(
        "苹果", "杯子", "书包", "窗户", "船帆", "茶壶", "城堡", "大门", "灯笼", "地图", "电车", "渡口", "粉笔", "风车",
        "港口", "钢琴", "古塔", "瓜田", "果园", "海岸", "河流", "湖泊", "花园", "火车", "集市", "街道", "镜子", "篮子",
        "梨树", "铃铛", "楼梯", "罗盘", "毛笔", "码头", "磨坊", "木桶", "鸟巢", "牛车", "炮台", "瓶子", "桥梁", "沙漠",
        "山谷", "石头", "手套", "水井", "松林", "台阶", "铁轨", "围墙", "小岛", "信件", "雪山", "岩石", "雨伞", "枕头",
    ),
    filler=(
        "天黑之前，人们常常从{0}走到{1}。",
        "没有人记得{0}旁边的{1}是谁建的。",
        "早晨的{0}是湿的，而{1}还很冷。",
        "有位画家画过{0}，却没有画{1}。",
        "{0}后面的路比{1}后面的路更长。",
        "孩子们喜欢躲在{0}和{1}之间。",
        "暴风雨过后，{0}需要修理，{1}也一样。",
        "大多数游客为{0}而来，却因为{1}留了下来。",
    ),
    noise="草是绿的。天是蓝的。太阳是黄的。我们出发吧。去了又回来。",
    joined=("、", "和"),
    kv=(
        "请记住下面这个字典里的值，之后我会问你其中的一个。\n{context}\n键“{query}”的值是什么？",
        "键“{query}”的值是",
    ),
    needle="{key}的一个特殊魔法数字是：{value}。",
    one_needle=(
        "下面的文字里藏着一个特殊的魔法数字，请务必记住它，之后我会考你这个数字。\n{context}\n"
        "文中提到的{query}的特殊魔法数字是什么？",
        "文中提到的{query}的特殊魔法数字是",
    ),
    needles=(
        "下面的文字里藏着一些特殊的魔法数字，请务必记住它们，之后我会考你这些数字。\n{context}\n"
        "文中提到的{query}的所有特殊魔法数字是什么？",
        "文中提到的{query}的特殊魔法数字是",
    ),
    chain=("变量{0} = {1}", "变量{0} = 变量{1}"),
    variables=(
        "请记住并追踪下面文字里隐藏的变量赋值链。\n\n{context}\n问题：在上面的文字中，找出所有值为{query}的变量。",
        "回答：根据上面文字中的变量赋值链，有{count}个变量的值是{query}，它们是：",
    ),
)
# fmt: on

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
