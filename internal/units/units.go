// Package units turns sizes as people write them ("64KiB", "1.5GiB") into
// bytes and back. All units are powers of 1024.
package units

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

const (
	KiB int64 = 1 << 10 // bytes
	MiB int64 = 1 << 20 // bytes
	GiB int64 = 1 << 30 // bytes
	TiB int64 = 1 << 40 // bytes
)

var byName = map[string]int64{
	"": 1, "b": 1,
	"k": KiB, "kib": KiB,
	"m": MiB, "mib": MiB,
	"g": GiB, "gib": GiB,
	"t": TiB, "tib": TiB,
}

var descending = []struct {
	name  string
	bytes int64
}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}}

// Parse returns the bytes that s stands for: a number, whole or with a decimal
// point, and B, KiB, MiB, GiB or TiB, or only the first letter of one, in any
// case. A size is never negative and is a whole number of bytes. KB and MB
// are refused, as nobody knows whether they mean 1000 or 1024.
func Parse(s string) (int64, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit, known := byName[strings.ToLower(s[len(digits):])]
	digits = strings.TrimSpace(digits)
	// Only digits and a point: big.Rat would also take "1/3", "1e9" and "0x10".
	plain := strings.Trim(digits, "0123456789.") == "" && strings.Count(digits, ".") <= 1
	if !known || !plain || len(digits) > 32 {
		return 0, notASize(s)
	}
	number, ok := new(big.Rat).SetString(digits)
	if !ok {
		return 0, notASize(s)
	}
	number.Mul(number, new(big.Rat).SetInt64(unit))
	if !number.IsInt() {
		return 0, fmt.Errorf("%q is not a whole number of bytes", s)
	}
	if !number.Num().IsInt64() {
		return 0, fmt.Errorf("%q is too large: want less than 8388608TiB", s)
	}
	return number.Num().Int64(), nil
}

func notASize(s string) error {
	return fmt.Errorf("%q is not a size: want a number and KiB, MiB or GiB", s)
}

// Format writes n bytes so that Parse gives n again: in the largest unit that
// divides it.
func Format(n int64) string {
	for _, u := range descending {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// Human writes n bytes for reading, to about three digits: "512 B", "1.46 GiB".
func Human(n int64) string {
	for _, u := range descending {
		if n >= u.bytes || n <= -u.bytes {
			value := float64(n) / float64(u.bytes)
			digits := 0
			switch {
			case value < 9.995 && value > -9.995:
				digits = 2
			case value < 99.95 && value > -99.95:
				digits = 1
			}
			return strconv.FormatFloat(value, 'f', digits, 64) + " " + u.name
		}
	}
	return strconv.FormatInt(n, 10) + " B"
}

// Size is a number of bytes that can be a command line flag (pflag.Value) or
// a text field.
type Size int64

// Set implements pflag.Value.
func (s *Size) Set(text string) error {
	n, err := Parse(text)
	if err != nil {
		return err
	}
	*s = Size(n)
	return nil
}

// String implements pflag.Value; Parse takes what it returns.
func (s *Size) String() string { return Format(int64(*s)) }

// Type implements pflag.Value: what help shows for the flag's argument.
func (s *Size) Type() string { return "SIZE" }
