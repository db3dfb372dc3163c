"""Pascal VOC's and YOLO's labels (oracles: boxes by hand, Python's encodings)."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import annotations
import labels


# ------------------------------------------------------------------------------------------------
# Pascal VOC
# ------------------------------------------------------------------------------------------------

def voc_object(name, box, extra=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def voc_xml(name, inside):
    size = "<size><width>40</width><height>30</height></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{inside}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """a has a dog and a difficult cat, b nothing; a is in train, both are in trainval."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC" / name).mkdir(parents=True)
    objects = (voc_object("dog", (5, 6, 25, 16))
               + voc_object("cat", ("1.5", 2, 9, 8), "<difficult>1</difficult>"))
    for name, inside in (("a", objects), ("b", "")):
        Image.new("RGB", (40, 30)).save(tmp_path / "VOC" / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "VOC" / "Annotations" / f"{name}.xml").write_text(voc_xml(name, inside))
    (tmp_path / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (tmp_path / "VOC" / "ImageSets" / "Main" / "trainval.txt").write_text("b\na\n")
    return tmp_path / "VOC"


def change(voc, old, new):
    """Replaces some of a.xml."""
    file = voc / "Annotations" / "a.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_voc_becomes_coco_that_the_reader_reads(voc, tmp_path):
    written = labels.voc2coco(voc, tmp_path / "out")
    assert [Path(file).name for file in written] == ["train.json", "trainval.json"]
    train, both = (annotations.read_annotations(*pair) for pair in written.items())
    assert train.file_names == ["a.jpg"] and both.file_names == ["b.jpg", "a.jpg"]
    assert both.first.tolist() == [0, 0, 2]
    assert train.class_names == both.class_names == ["cat", "dog"]
    # edges, so the dog is 20 pixels wide
    assert both.boxes.tolist() == [[5, 6, 25, 16], [1.5, 2, 9, 8]]
    assert both.labels.tolist() == [1, 0] and both.crowd.tolist() == [False, True]
    assert both.area.tolist() == [200, 45]


def test_vocs_own_lists_of_one_class_are_left_out_and_named(voc, tmp_path, capsys):
    """VOC's ImageSets/Main also holds dog_train.txt and the like: a name and 1, -1 or 0 a line."""
    (voc / "ImageSets" / "Main" / "dog_trainval.txt").write_text("a  1\nb -1\n")
    (voc / "ImageSets" / "Main" / "test.txt").write_text("\n")
    assert len(labels.voc2coco(voc, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "lists of one class: dog_trainval.txt" in said and "empty lists: test.txt" in said


def rename(voc, old, new):
    """A picture, its XML and its place in train.txt."""
    for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        (voc / folder / f"{old}{suffix}").rename(voc / folder / f"{new}{suffix}")
    (voc / "ImageSets" / "Main" / "train.txt").write_text(f"{new}\n")
    (voc / "ImageSets" / "Main" / "trainval.txt").unlink()


@pytest.mark.parametrize("name", ["img 1", "img 2", "a photo"])
def test_a_name_with_a_space_makes_no_list_of_a_class(voc, tmp_path, name):
    """`img 1` alone could be the picture `img` with a 1, but there is no such picture."""
    rename(voc, "a", name)
    (file, images), = labels.voc2coco(voc, tmp_path / "out").items()
    assert annotations.read_annotations(file, images).file_names == [f"{name}.jpg"]


@pytest.mark.parametrize("line", ["a.jpg", "JPEGImages/a.jpg", "D:\\voc\\a.jpg", "  a  ",
                                  "a\na"])
def test_a_list_may_name_pictures_and_paths_and_a_name_twice(voc, tmp_path, line):
    (voc / "ImageSets" / "Main" / "train.txt").write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    labels.voc2coco(voc, tmp_path / "out")
    images = json.loads((tmp_path / "out" / "train.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.jpg"]


def test_lists_of_classes_alone_are_nothing_to_write(voc, tmp_path, command):
    for file in (voc / "ImageSets" / "Main").iterdir():
        file.write_text("a 1\nb -1\n")
    code, out, err = command(annotations, "voc2coco", voc, "--out", tmp_path / "out")
    assert code == 2 and not out and "none of the lists" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("filename", [
    "<filename>DSC_0.jpg</filename>", "", "<filename/>", "<filename>a</filename>",
    "<filename>C:\\photos\\a.jpg</filename>", "<filename> a.jpg\n</filename>",
    "<filename>a.png</filename>", "<filename>/home/me/other/a.JPG</filename>",
    # the name of another picture: a copy whose text was not changed
    "<filename>b.jpg</filename>"])
def test_a_picture_is_found_whatever_filename_says(voc, tmp_path, filename):
    change(voc, "<filename>a.jpg</filename>", filename)
    labels.voc2coco(voc, tmp_path / "out")
    images = json.loads((tmp_path / "out" / "train.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.jpg"]


def test_filename_is_followed_where_the_xml_is_called_otherwise(voc, tmp_path):
    (voc / "JPEGImages" / "a.jpg").rename(voc / "JPEGImages" / "photo 7.jpeg")
    change(voc, "a.jpg", "photo 7.jpg")
    labels.voc2coco(voc, tmp_path / "out")
    images = json.loads((tmp_path / "out" / "train.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["photo 7.jpeg"]


def test_a_picture_goes_before_the_mask_of_the_same_name(voc, tmp_path):
    for folder in ("SegmentationClass", "SegmentationObject", "AMasks"):
        (voc / folder).mkdir()
        Image.new("L", (40, 30)).save(voc / folder / "a.png")
    change(voc, "<filename>a.jpg</filename>", "<filename>old.bmp</filename>")
    written = labels.voc2coco(voc, tmp_path / "out")
    assert set(written.values()) == {str(voc / "JPEGImages")}


def test_folders_may_be_links_and_what_is_hidden_is_no_data(voc, tmp_path):
    (voc / "JPEGImages").rename(tmp_path / "elsewhere")
    (voc / "JPEGImages").symlink_to(tmp_path / "elsewhere")
    for name in (".trash", "Annotations/.old"):
        (voc / name).mkdir()
        (voc / name / "a.xml").write_text("no XML")
    (voc / "Annotations" / "._a.xml").write_bytes(b"\0\5")                # macOS's
    written = labels.voc2coco(voc, tmp_path / "out")
    assert set(written.values()) == {str(voc / "JPEGImages")}


def test_without_its_picture_an_annotation_is_refused(voc, tmp_path):
    (voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(annotations.DataError, match="a.xml: its picture is not there.*'a.jpg'"):
        labels.voc2coco(voc, tmp_path / "out")


@pytest.mark.parametrize("size", [
    "", "<size/>", "<size><width>0</width><height>0</height></size>",
    "<size><width/><height>30</height></size>",
    "<size><width>40.0</width><height> 30 </height></size>"])
def test_a_size_that_is_absent_or_zero_is_the_pictures(voc, tmp_path, size):
    change(voc, "<size><width>40</width><height>30</height></size>", size)
    labels.voc2coco(voc, tmp_path / "out")
    image, = json.loads((tmp_path / "out" / "train.json").read_text())["images"]
    assert (image["width"], image["height"]) == (40, 30)


@pytest.mark.parametrize("text, crowd", [
    ("<difficult/>", 0), ("<difficult> 1\n</difficult>", 1), ("<difficult>true</difficult>", 1),
    ("<difficult>No</difficult>", 0), ("<difficult>Unspecified</difficult>", 0), ("", 0)])
def test_difficult_is_read_as_people_write_it(voc, tmp_path, text, crowd):
    change(voc, "<difficult>1</difficult>", text)
    labels.voc2coco(voc, tmp_path / "out")
    boxes = json.loads((tmp_path / "out" / "train.json").read_text())["annotations"]
    assert [box["iscrowd"] for box in boxes] == [0, crowd]


def test_names_of_classes_are_stripped(voc, tmp_path):
    change(voc, "<name>dog</name>", "<name>\n  hot\n  dog </name>")
    labels.voc2coco(voc, tmp_path / "out")
    categories = json.loads((tmp_path / "out" / "train.json").read_text())["categories"]
    assert [c["name"] for c in categories] == ["cat", "hot dog"]


@pytest.mark.parametrize("encoding, declared", [
    ("utf-8", None), ("utf-8-sig", "utf-8"), ("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1"),
    ("cp1252", "windows-1252"), ("gbk", "GBK"), ("utf-8", "utf-16")])
def test_an_xml_is_read_in_the_encoding_that_it_says(voc, tmp_path, encoding, declared):
    """GBK has several bytes a letter, which Python's own parser refuses."""
    name = "狗" if encoding == "gbk" else "Käfer"
    file = voc / "Annotations" / "a.xml"
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    file.write_bytes((head + file.read_text().replace("dog", name)).encode(encoding))
    labels.voc2coco(voc, tmp_path / "out")
    categories = json.loads((tmp_path / "out" / "train.json").read_text())["categories"]
    assert name in [c["name"] for c in categories]


@pytest.mark.parametrize("head, words", [
    (b"", "a.xml: not in UTF-8: byte 0xe4"), (b'<?xml version="1.0" encoding="nonsense"?>',
                                              "a.xml: its encoding 'nonsense' is unknown")])
def test_an_encoding_that_the_xml_does_not_say_is_told(voc, tmp_path, head, words):
    file = voc / "Annotations" / "a.xml"
    file.write_bytes(head + file.read_text().replace("dog", "Käfer").encode("latin-1"))
    with pytest.raises(annotations.DataError, match=words):
        labels.voc2coco(voc, tmp_path / "out")


def labelled_folder(folder, names, beside=True):
    """labelImg's: an XML beside each picture, or the XML in labels/ and the pictures in photos/."""
    for name in names:
        xml, photo = folder / f"{name}.xml", folder / f"{name}.jpg"
        if not beside:
            xml = xml.parent / "labels" / xml.name
            photo = photo.parent / "photos" / photo.name
        for file in (xml, photo):
            file.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(voc_xml("old", voc_object("dog", (5, 6, 25, 16))))
        Image.new("RGB", (40, 30)).save(photo)
    return folder


@pytest.mark.parametrize("given, pictures", [(".", "."), (None, "photos"), ("labels", "photos")])
def test_a_folder_of_xml_without_lists_goes_into_one_file(tmp_path, capsys, given, pictures):
    folder = labelled_folder(tmp_path / "in", ["a", "b", "c"], beside=given == ".")
    Image.new("RGB", (9, 9)).save(folder / pictures / "unlabelled.png")
    (folder / ".hidden.xml").write_text("no XML")
    (file, images), = labels.voc2coco(folder / (given or "."), tmp_path / "out").items()
    assert Path(file).name == "all.json" and Path(images) == folder / pictures
    assert annotations.read_annotations(file, images).file_names == ["a.jpg", "b.jpg", "c.jpg"]
    assert "pictures without XML: unlabelled.png" in capsys.readouterr().err


def test_folders_called_like_splits_are_splits(tmp_path):
    folder = labelled_folder(tmp_path / "in", ["train/a", "train/b", "valid/a"])
    written = labels.voc2coco(folder, tmp_path / "out")
    assert {Path(file).name: Path(images) for file, images in written.items()} == {
        "train.json": folder / "train", "valid.json": folder / "valid"}
    train, val = (annotations.read_annotations(*pair) for pair in written.items())
    assert train.file_names == ["a.jpg", "b.jpg"] and val.file_names == ["a.jpg"]


def test_two_annotations_of_one_picture_are_refused(tmp_path):
    folder = labelled_folder(tmp_path / "in", ["a"])
    (folder / "b.xml").write_text(voc_xml("a", ""))
    with pytest.raises(annotations.DataError, match="b.xml: is of the picture .*a.jpg, as is"):
        labels.voc2coco(folder, tmp_path / "out")


def test_a_share_is_cut_off_the_same_in_every_run_and_another_with_another_seed(
        tmp_path, command):
    folder = labelled_folder(tmp_path / "in", [f"p{n:02}" for n in range(20)])
    found = {}
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        code, _, _ = command(annotations, "voc2coco", folder, "--out", tmp_path / out,
                             "--val-share", "0.2", "--seed", seed)
        assert code == 0
        train, val = (json.loads((tmp_path / out / f"{split}.json").read_text())["images"]
                      for split in ("train", "val"))
        names = [[image["file_name"] for image in images] for images in (train, val)]
        assert len(names[1]) == 4
        assert sorted(names[0] + names[1]) == [f"p{n:02}.jpg" for n in range(20)]
        found[out] = names
    assert found["one"] == found["two"] != found["three"]


def test_where_splits_are_made_already_none_is_cut_off(voc, tmp_path):
    with pytest.raises(annotations.DataError, match="made already .train, trainval."):
        labels.voc2coco(voc, tmp_path / "out", val_share=0.5)
    (voc / "ImageSets" / "Main" / "train.txt").unlink()
    written = labels.voc2coco(voc, tmp_path / "out", val_share=0.5)
    assert [Path(file).name for file in written] == ["train.json", "val.json"]


def test_the_order_of_the_pictures_does_not_change_who_is_held_out():
    """Nor does the machine, or the day: the three of printf "0 $i" | sha256sum that sort first."""
    assert labels.held_out(range(10), 0.3) == {6, 4, 2}
    ids = list(range(100))
    held = labels.held_out(ids, 0.25)
    assert len(held) == 25 and held == labels.held_out(ids[::-1], 0.25) < set(ids)
    assert len(labels.held_out([1, 2], 0.001)) == len(labels.held_out([1, 2], 0.999)) == 1
    for share, few in ((0.5, [1]), (0, [1, 2]), (1, [1, 2]), (float("nan"), [1, 2])):
        with pytest.raises(annotations.DataError, match="--val-share"):
            labels.held_out(few, share)


@pytest.mark.parametrize("xml", [
    None, "", "<annotation>", "<nothing/>",
    voc_xml("a", "<object><name>dog</name></object>"),
    voc_xml("a", voc_object("dog", ("five", 6, 25, 16))),
    voc_xml("a", voc_object("dog", (5, 6, 25))),
])
def test_a_broken_voc_annotation_is_named(voc, tmp_path, xml):
    (voc / "Annotations" / "a.xml").unlink()
    if xml is not None:
        (voc / "Annotations" / "a.xml").write_text(xml)
    with pytest.raises(annotations.DataError, match="a.xml"):
        labels.voc2coco(voc, tmp_path / "out")


def test_a_voc_object_without_a_name_is_named(voc, tmp_path):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<name>dog</name>", ""))
    with pytest.raises(annotations.DataError, match="a.xml"):
        labels.voc2coco(voc, tmp_path / "out")


def test_a_voc_list_means_the_file_whose_path_it_gives(tmp_path):
    """Names repeat in the folders of splits, here without a folder in val's list."""
    for n, split in enumerate(("train", "val")):
        for kind in ("Annotations", "JPEGImages"):
            (tmp_path / "VOC" / kind / split).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "VOC" / "JPEGImages" / split / "a.jpg")
        (tmp_path / "VOC" / "Annotations" / split / "a.xml").write_text(
            voc_xml("a", voc_object("dog", (1 + n, 2, 9, 9))))
    (tmp_path / "VOC" / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("train/a\n")
    (tmp_path / "VOC" / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    written = labels.voc2coco(tmp_path / "VOC", tmp_path / "out")
    left = {Path(file).name: annotations.read_annotations(file, images).boxes[0, 0].item()
            for file, images in written.items()}
    assert left == {"train.json": 1, "val.json": 2}


def test_a_voc_box_without_extent_is_carried_over_for_the_check_to_find(voc, tmp_path):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<xmax>25</xmax>", "<xmax>5</xmax>"))
    written = labels.voc2coco(voc, tmp_path / "out")
    for file, images in written.items():
        with pytest.raises(annotations.DataError, match="no extent"):
            annotations.read_annotations(file, images)


# ------------------------------------------------------------------------------------------------
# YOLO
# ------------------------------------------------------------------------------------------------

def yolo(folder, pairs, names=("data.yaml", "names: [cat, dog]\n")):
    """A folder with pictures of 40 x 20 and their texts.  pairs: {picture: (text file, text)}"""
    for picture, (file, text) in pairs.items():
        for path in (folder / picture, folder / (file or picture)):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(folder / picture)
        if file:
            (folder / file).write_text(text)
    (folder / names[0]).write_text(names[1])
    return folder


# the dog of 20 x 10 pixels around (20, 5), and the triangle (4, 2), (36, 2), (4, 18) of a cat
DOG, CAT = "1 0.5 0.25 0.5 0.5", "0 0.1 0.1 0.9 0.1 0.1 0.9"


@pytest.mark.parametrize("pairs, expected", [
    ({"a.jpg": ("a.txt", DOG)}, {"all.json": "."}),
    ({"images/a.jpg": ("labels/a.txt", DOG)}, {"all.json": "images"}),
    ({"images/train/a.jpg": ("labels/train/a.txt", DOG),
      "images/val/a.jpg": ("labels/val/a.txt", CAT)},
     {"train.json": "images/train", "val.json": "images/val"}),
    ({"train/images/a.jpg": ("train/labels/a.txt", DOG),
      "valid/images/a.jpg": ("valid/labels/a.txt", CAT)},
     {"train.json": "train/images", "valid.json": "valid/images"}),
    ({"obj_train_data/a.jpg": ("obj_train_data/a.txt", DOG)}, {"all.json": "obj_train_data"}),
    ({"images/train2017/a.jpg": ("labels/train2017/a.txt", DOG)},
     {"train2017.json": "images/train2017"}),
])
def test_pictures_and_texts_are_paired_in_every_layout(tmp_path, pairs, expected):
    folder = yolo(tmp_path / "in", pairs)
    written = labels.yolo2coco(folder, tmp_path / "out")
    assert {Path(file).name: Path(images) for file, images in written.items()} == {
        name: folder / images for name, images in expected.items()}
    boxes = {DOG: [10, 0, 30, 10], CAT: [4, 2, 36, 18]}
    for (file, images), (_, text) in zip(written.items(), pairs.values()):
        a = annotations.read_annotations(file, images)
        assert a.file_names == ["a.jpg"] and a.sizes.tolist() == [[20, 40]]
        assert a.class_names == ["cat", "dog"] and a.category_ids == [0, 1]
        assert a.labels.tolist() == [text == DOG] and not a.crowd.any()
        assert torch.allclose(a.boxes, torch.tensor([boxes[text]]).float(), atol=1e-4)


@pytest.mark.parametrize("name, text, names", [
    ("classes.txt", "cat\n traffic light \n\n", ["cat", "traffic light"]),
    ("obj.names", "cat\r\ndog\r\n", ["cat", "dog"]),
    ("data.yaml", "train: ../train/images\nnc: 2\nnames: ['cat', \"hot dog\"]\n",
     ["cat", "hot dog"]),
    ("data.yaml", "names: [cat, dog] # two\nnc: 2", ["cat", "dog"]),
    ("data.yaml", "names:\n  0: cat\n  1: 'it''s, a: dog'  # a comment\n\nnc: 2\n",
     ["cat", "it's, a: dog"]),
    ("data.yaml", "# names: [no]\nnames:\n- cat\n- dog\nnc: 2\n", ["cat", "dog"]),
    ("data.yaml", "names:\n  - cat\n\n  # a comment\n  - C# dog\n", ["cat", "C# dog"]),
    ("data.yaml", "names: ['cat',\n        'dog',]\nnc: 2\n", ["cat", "dog"]),
    ("data.yaml", "names: [\n  'cat',\n  'dog'\n]\nnc: 2\n", ["cat", "dog"]),
    ("data.yaml", "names: {0: cat, 1: dog}\n", ["cat", "dog"]),
    ("data.yaml", "names: [men's, women's, kids]\n", ["men's", "women's", "kids"]),
    ("data.yaml", "---\nnames: &n\n  - no\n  - 12\nagain: *n\n", ["no", "12"]),
    ("data.yaml", '{"names": ["caf\\u00e9", "dog"]}', ["caf\u00e9", "dog"]),
    ("custom.yml", "\ufeffnames:\r\n  0: cat\r\n  1: K\u00e4fer\r\n", ["cat", "K\u00e4fer"]),
])
def test_names_are_read_from_the_files_that_people_have(tmp_path, name, text, names):
    """The forms of YAML are those of the YAML specification's examples."""
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", DOG)})
    (folder / "data.yaml").unlink()
    (folder / name).write_bytes(text.encode())
    (file, images), = labels.yolo2coco(folder, tmp_path / "out").items()
    assert annotations.read_annotations(file, images).class_names == names


@pytest.mark.parametrize("text, words", [
    ("names: [cat, dog\n", "not valid YAML"), ("names: {cat: 0}\n", "`names` must be a list"),
    ("names: 5\n", "`names` must be a list"), ("names: [[a], b]\n", "`names` must be a list")])
def test_names_that_cannot_be_understood_are_told(tmp_path, command, text, words):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", DOG)}, ("data.yaml", text))
    code, _, err = command(annotations, "yolo2coco", folder, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and f"data.yaml: {words}" in err


def test_without_names_a_sentence_says_what_to_write(tmp_path, command):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", DOG)}, ("data.yaml", "nc: 2\n"))
    code, _, err = command(annotations, "yolo2coco", folder, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "data.yaml" in err and "classes.txt" in err


@pytest.mark.parametrize("line, words", [
    ("1 0.5 0.25 0.5", "4 numbers"),
    ("1 0.5 0.25 0.5 0.5 0.9", "6 numbers"),
    ("1 0.1 0.1 0.5 0.5 0.1 0.9 0.3", "8 numbers"),
    ("2 0.5 0.25 0.5 0.5", "class 2 has no name; there are 2"),
    ("-1 0.5 0.25 0.5 0.5", "class -1"),
    ("0.5 0.5 0.25 0.5 0.5", "class 0.5"),
    ("dog 0.5 0.25 0.5 0.5", "'dog'"),
    ("1 20 5 20 10", "shares of the picture"),
    ("1 0.5 nan 0.5 0.5", "shares of the picture"),
])
def test_bad_lines_are_named(tmp_path, line, words):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", f"{DOG}\n\n{line}\n"),
                                    "b.jpg": ("b.txt", f"{line}\n")})
    with pytest.raises(annotations.DataError) as refused:
        labels.yolo2coco(folder, tmp_path / "out")
    text = str(refused.value)
    assert text.startswith("2 bad line(s)") and words in text
    assert "a.txt, line 3:" in text and "b.txt, line 1:" in text and "\n" not in text


def test_a_whole_float_is_a_class_and_a_box_without_extent_is_left_for_the_check(tmp_path):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", "1.0 0.5 0.5 0 0.5")})
    (file, images), = labels.yolo2coco(folder, tmp_path / "out").items()
    with pytest.raises(annotations.DataError, match="no extent"):
        annotations.read_annotations(file, images)


def test_keypoints_leave_the_box(tmp_path):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", f"{DOG} 0.1 0.1 2 0.9 0.9 2")},
                  ("data.yaml", "kpt_shape: [2, 3]\nnames: [cat, dog]\n"))
    (file, images), = labels.yolo2coco(folder, tmp_path / "out").items()
    assert annotations.read_annotations(file, images).boxes.tolist() == [[10, 0, 30, 10]]


def test_pictures_without_a_text_have_no_objects_and_texts_without_a_picture_are_named(
        tmp_path, capsys):
    folder = yolo(tmp_path / "in", {"a.jpg": ("a.txt", DOG), "b.jpg": ("b.txt", ""),
                                    "c.jpg": (None, "")})
    (folder / "gone.txt").write_text(DOG)
    (folder / "README.txt").write_text("from a website")
    (file, images), = labels.yolo2coco(folder, tmp_path / "out").items()
    assert annotations.read_annotations(file, images).first.tolist() == [0, 1, 1, 1]
    said = capsys.readouterr().err
    assert "left out 1 text files without a picture: gone.txt" in said and "README" not in said
    assert "1 picture(s) without a text file" in said and "c.jpg" in said


def test_previews_beside_the_splits_are_left_out_and_backgrounds_within_are_not(tmp_path, capsys):
    folder = yolo(tmp_path / "in", {"images/train/a.jpg": ("labels/train/a.txt", DOG),
                                    "images/train/empty.jpg": (None, ""),
                                    "preview.png": (None, "")})
    (file, images), = labels.yolo2coco(folder, tmp_path / "out").items()
    assert annotations.read_annotations(file, images).file_names == ["a.jpg", "empty.jpg"]
    assert "pictures beside the splits: preview.png" in capsys.readouterr().err


def test_lists_of_pictures_are_splits(tmp_path):
    """Darknet's: train.txt and valid.txt with the paths of pictures."""
    folder = yolo(tmp_path / "in", {f"data/{n}.jpg": (f"data/{n}.txt", DOG) for n in "abc"},
                  ("obj.names", "cat\ndog\n"))
    (folder / "train.txt").write_text("data/a.jpg\nC:\\old\\data\\b.jpg\n")
    (folder / "valid.txt").write_text("data/c.jpg\n")
    labels.yolo2coco(folder, tmp_path / "out")
    found = {file.name: [image["file_name"] for image in json.loads(file.read_text())["images"]]
             for file in (tmp_path / "out").iterdir()}
    assert found == {"train.json": ["a.jpg", "b.jpg"], "valid.json": ["c.jpg"]}


def listed(out):
    return {file.name: [image["file_name"] for image in json.loads(file.read_text())["images"]]
            for file in out.iterdir()}


def test_a_list_means_the_picture_whose_path_it_gives(tmp_path):
    """Names repeat in the folders of splits; a picture may be in several lists."""
    folder = yolo(tmp_path / "in", {f"images/{split}/{n}.jpg": (f"labels/{split}/{n}.txt", DOG)
                                    for split in ("train", "val") for n in "ab"})
    (folder / "train.txt").write_text("/old/images/train/a.jpg\n/old/images/train/b.jpg\n")
    (folder / "val.txt").write_text("images\\val\\a.jpg\n./images/val/b.jpg\n")
    (folder / "trainval.txt").write_text("images/train/a.jpg\nimages/val/a.jpg\n")
    labels.yolo2coco(folder, tmp_path / "out")
    assert listed(tmp_path / "out") == {"train.json": ["a.jpg", "b.jpg"],
                                        "val.json": ["a.jpg", "b.jpg"],
                                        "trainval.json": ["train/a.jpg", "val/a.jpg"]}


def test_a_list_that_names_a_missing_picture_is_told(tmp_path):
    folder = yolo(tmp_path / "in", {f"{n}.jpg": (f"{n}.txt", DOG) for n in "abc"})
    (folder / "val.txt").write_text("a.jpg\nb.jpg\nz.jpg\n")
    with pytest.raises(annotations.DataError, match="val.txt: names 'z.jpg'.*1 of 3"):
        labels.yolo2coco(folder, tmp_path / "out")


def test_a_text_is_of_one_splits_picture_alone(tmp_path):
    folder = yolo(tmp_path / "in", {"train/images/a.jpg": ("train/labels/a.txt", DOG),
                                    "train/images/b.jpg": (None, ""),
                                    "valid/images/b.jpg": ("valid/labels/b.txt", CAT)})
    written = labels.yolo2coco(folder, tmp_path / "out")
    found = {Path(file).name: annotations.read_annotations(file, images).first.tolist()
             for file, images in written.items()}
    assert found == {"train.json": [0, 1, 1], "valid.json": [0, 1]}


def test_links_that_lead_in_a_circle_are_followed_once(tmp_path):
    folder = yolo(tmp_path / "in", {"images/a.jpg": ("images/a.txt", DOG)})
    (folder / "images" / "again").symlink_to(folder)
    labels.yolo2coco(folder, tmp_path / "out")
    assert listed(tmp_path / "out") == {"all.json": ["a.jpg"]}


def test_yolos_share_is_cut_off_too(tmp_path, command):
    folder = yolo(tmp_path / "in", {f"{n}.jpg": (f"{n}.txt", DOG) for n in range(10)})
    code, out, _ = command(annotations, "yolo2coco", folder, "--out", tmp_path / "out",
                           "--val-share", "0.3")
    assert code == 0 and str(folder) in out
    sizes = [len(json.loads((tmp_path / "out" / f"{split}.json").read_text())["images"])
             for split in ("train", "val")]
    assert sizes == [7, 3]


@pytest.mark.parametrize("convert", ["voc2coco", "yolo2coco"])
@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_where_nothing_is_written_the_code_is_2_and_a_line_says_why(
        tmp_path, command, convert, folder):
    (tmp_path / "empty").mkdir()
    code, out, err = command(annotations, convert, tmp_path / folder, "--out", tmp_path / "out")
    assert code == 2 and not out and err.count("\n") == 1 and str(tmp_path / folder) in err
