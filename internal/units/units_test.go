package units

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseTakesWhatPeopleWrite(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "4096": 4096, "512B": 512,
		"64KiB": 64 << 10, "64K": 64 << 10, "64k": 64 << 10, "64 kib": 64 << 10,
		"200MiB": 200 << 20, "1.5GiB": 3 << 29, "0.5M": 1 << 19, "2t": 2 << 40,
		"9223372036854775807": math.MaxInt64, ".5k": 512,
	} {
		got, err := Parse(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
}

func TestParseRefusesWhatIsNoSize(t *testing.T) {
	for text, want := range map[string]string{
		"12x":                 `"12x" is not a size: want a number and KiB, MiB or GiB`,
		"":                    `"" is not a size: want a number and KiB, MiB or GiB`,
		"KiB":                 `"KiB" is not a size: want a number and KiB, MiB or GiB`,
		".":                   `"." is not a size: want a number and KiB, MiB or GiB`,
		"-1":                  `"-1" is not a size: want a number and KiB, MiB or GiB`,
		"1e9":                 `"1e9" is not a size: want a number and KiB, MiB or GiB`,
		"1/2":                 `"1/2" is not a size: want a number and KiB, MiB or GiB`,
		"1.2.3":               `"1.2.3" is not a size: want a number and KiB, MiB or GiB`,
		"64KB":                `"64KB" is not a size: want a number and KiB, MiB or GiB`,
		"1.5":                 `"1.5" is not a whole number of bytes`,
		"9223372036854775808": `"9223372036854775808" is too large: want less than 8388608TiB`,
		"8388608TiB":          `"8388608TiB" is too large: want less than 8388608TiB`,
	} {
		_, err := Parse(text)
		require.EqualError(t, err, want, text)
	}
}

func TestFormatIsParsedBack(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 1: "1", 1023: "1023", 1024: "1KiB", 65536: "64KiB", 1536: "1536",
		200 << 20: "200MiB", 1 << 30: "1GiB", 3 << 40: "3TiB", math.MaxInt64: "9223372036854775807",
	} {
		require.Equal(t, want, Format(n))
		back, err := Parse(Format(n))
		require.NoError(t, err)
		require.Equal(t, n, back)
	}
}

func TestHumanKeepsThreeDigits(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 10 << 20: "10.0 MiB",
		100 << 20: "100 MiB", 1<<30 + 1<<29: "1.50 GiB", 1 << 50: "1024 TiB", -2048: "-2.00 KiB",
	} {
		require.Equal(t, want, Human(n))
	}
}

func TestSizeIsAFlag(t *testing.T) {
	s := Size(64 << 10)
	require.Equal(t, "64KiB", s.String())
	require.NoError(t, s.Set("1MiB"))
	require.Equal(t, Size(1<<20), s)
	require.Error(t, s.Set("12x"))
	require.Equal(t, Size(1<<20), s, "a refused text changes nothing")
	require.Equal(t, "SIZE", s.Type())
}
