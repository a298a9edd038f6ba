package disks

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]Spec{
		"a.raw":            {Name: "a", Path: "a.raw"},
		"/x/b.c.img":       {Name: "b.c", Path: "/x/b.c.img"},
		"/dev/vg/lv":       {Name: "lv", Path: "/dev/vg/lv"},
		".raw":             {Name: ".raw", Path: ".raw"},
		"root=/dev/vda":    {Name: "root", Named: true, Path: "/dev/vda"},
		"root=a=b.raw":     {Name: "root", Named: true, Path: "a=b.raw"},
		"./a=b.raw":        {Name: "a=b", Path: "./a=b.raw"},
		"/x=y/a.raw":       {Name: "a", Path: "/x=y/a.raw"},
		"mein Ding=a.raw":  {Name: "mein Ding", Named: true, Path: "a.raw"},
		"größe=/tmp/a.raw": {Name: "größe", Named: true, Path: "/tmp/a.raw"},
	} {
		got, err := ParseSpec(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got, in)
	}
	for _, in := range []string{"", "=a.raw", "a=", "a\nb=x", "a\x00=x", "a\xff=x", strings.Repeat("a", 4097) + "=x"} {
		_, err := ParseSpec(in)
		require.Error(t, err, "%.20q", in)
	}
}

func TestParseSpecsRefusesTwins(t *testing.T) {
	_, err := ParseSpecs([]string{"x/a.raw", "y/a.raw"})
	require.ErrorContains(t, err, `both called "a"`)
	_, err = ParseSpecs([]string{"a=a.raw", "b=./a.raw"})
	require.ErrorContains(t, err, "given twice")
	specs, err := ParseSpecs([]string{"a.raw", "b=c/a.raw"})
	require.NoError(t, err)
	require.Len(t, specs, 2)
}

// hostileNames is trap P7: names that a peer may send.
var hostileNames = []string{
	"", ".", "..", "../a", "a/b", "/etc/passwd", "a\x00b", ".hidden", "a\nb", "a b", "a\\b", "\xff\xfe", "größe", "~root", "$(x)",
	"-\x7f", "a:b", strings.Repeat("a", 256), strings.Repeat("a", 64<<10),
}

func TestHostileNamesAreNoFileNames(t *testing.T) {
	for _, name := range hostileNames {
		require.Error(t, CheckFileName(name), "%.20q", name)
	}
	for _, name := range []string{"a", "vm-1_root.disk", "0", "-", strings.Repeat("a", 255)} {
		require.NoError(t, CheckFileName(name), name)
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"", "a b", "größe", "../a", strings.Repeat("a", 4096)} {
		require.NoError(t, CheckName(name))
	}
	for _, name := range []string{"a\x00", "\n", "\x1b[2J", "\xff", strings.Repeat("a", 4097), "a\u202eb"} {
		require.Error(t, CheckName(name), "%.20q", name)
	}
}

func TestPlaceMaps(t *testing.T) {
	for _, c := range []struct {
		disks, maps []string
		want        []string // the maps of the disks
		err         string
	}{
		{[]string{"a.raw"}, nil, []string{""}, ""},
		{[]string{"a.raw"}, []string{"m"}, []string{"m"}, ""},
		{[]string{"vm=a.raw"}, []string{"./x=m"}, []string{"./x=m"}, ""},
		{[]string{"/dev/vg/a", "data=b"}, []string{"data=n", "a=/maps/m"}, []string{"/maps/m", "n"}, ""},
		{[]string{"a", "b"}, []string{"b=n"}, []string{"", "n"}, ""},
		{[]string{"a", "b"}, []string{"n"}, nil, "whose map"},
		{[]string{"a"}, []string{"c=n"}, nil, `no --disk is called "c"`},
		{[]string{"a"}, []string{"m", "n"}, nil, "both for the disk"},
		{[]string{"a", "b"}, []string{"a=m", "b=./m"}, nil, "given twice"},
		{[]string{"a", "b"}, []string{"a=b"}, nil, "is a disk"},
		{[]string{"a"}, []string{"a="}, nil, "both sides"},
		{[]string{"a"}, []string{""}, nil, "empty"},
	} {
		specs, err := ParseSpecs(c.disks)
		require.NoError(t, err)
		err = PlaceMaps(specs, c.maps)
		if c.err != "" {
			require.ErrorContains(t, err, c.err, "%v", c.maps)
			continue
		}
		require.NoError(t, err, "%v", c.maps)
		for i, want := range c.want {
			require.Equal(t, want, specs[i].Map)
		}
	}
}
